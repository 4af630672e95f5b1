"""The attention pattern, which mlx-lm's models never hold as an array.

Their attention calls a fused kernel (gemma2: softmax) that it finds among the globals of its module. To see the
pattern, that very function is run over other globals, in which the name means an attention that can be looked
into: queries, keys, mask and scale are then what the model itself made of them, with whatever norms, rotations,
windows and sinks it has, and nothing is patched that another thread could see.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.core as mx

_FUSED = "scaled_dot_product_attention"

Look = Callable[[mx.array], mx.array]  # pattern [b, heads, t, keys] -> the one to use; itself changes nothing


def is_open(attention: type) -> bool:
    """Whether this class of attention can be looked into."""
    call = getattr(attention, "_mlxsae_base", attention).__call__  # beneath the class that a hooked one wears
    return isinstance(call, FunctionType) and _name(call) is not None


def _name(call: FunctionType) -> str | None:
    names = call.__code__.co_names
    if _FUSED in names and _FUSED in call.__globals__:
        return _FUSED
    return "mx" if "softmax" in names and call.__globals__.get("mx") is mx else None


def opened(call: Any, look: Look) -> Callable[..., Any]:
    """`call`, the `__call__` of an attention class, with `look` at its pattern."""
    name = _name(call)
    if name is None:
        raise ValueError(f"[hooks] {call.__qualname__} must use {_FUSED} or mx.softmax to show its pattern.")
    spy = _attention(call.__globals__[name], look) if name == _FUSED else _Softmax(look)
    changed = FunctionType(
        call.__code__, call.__globals__ | {name: spy}, call.__name__, call.__defaults__, call.__closure__
    )
    changed.__kwdefaults__ = call.__kwdefaults__
    return changed


def _attention(fused: Callable[..., mx.array], look: Look) -> Callable[..., mx.array]:
    def attend(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any = None,
        scale: float = 1.0,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not isinstance(keys, mx.array):
            raise ValueError("[hooks] the KV cache must not be quantised where attn_pattern is looked at.")
        pattern = softmax_pattern(queries, keys, scale, mask, sinks)
        order = _order_of_keys(cache, keys.shape[2])
        if order is not None:
            pattern = pattern[..., order]
        seen = look(pattern)
        if seen is pattern:  # the model's own bits, and the pattern stays uncomputed unless somebody wants it
            options = {} if sinks is None else {"sinks": sinks}
            return fused(queries, keys, values, cache=cache, scale=scale, mask=mask, **options)
        if order is not None:
            seen = seen[..., mx.argsort(order)]
        b, heads, t, n = seen.shape
        mixed = seen.reshape(b, values.shape[1], -1, t, n) @ values[:, :, None]
        return mixed.reshape(b, heads, t, -1).astype(queries.dtype)

    return attend


def _order_of_keys(cache: Any, n: int) -> mx.array | None:
    """Where the `n` keys of a full cache of a sliding window lie, from the oldest; None where they lie in order.

    Such a cache puts the newest key in the place of the oldest.
    """
    from mlx_lm.models.cache import RotatingKVCache

    if not isinstance(cache, RotatingKVCache) or cache._idx >= n:
        return None
    kept, newest = cache.keep, cache._idx
    return mx.concatenate([mx.arange(kept), mx.arange(newest, n), mx.arange(kept, newest)])


def softmax_pattern(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`softmax(scale * queries @ keys.T + mask)` in float32, given back in the dtype of `queries`.

    `queries [b, heads, t, d]`, `keys [b, kv_heads, n, d]`, `mask` "causal", bool or additive and broadcastable
    to `[b, heads, t, n]`, `sinks [heads]`: logits that take part in the softmax and are then left out. Returns
    `[b, heads, t, n]`.
    """
    b, heads, t, d = queries.shape
    n = keys.shape[2]
    grouped = queries.astype(mx.float32).reshape(b, keys.shape[1], -1, t, d)
    scores = scale * grouped @ keys.astype(mx.float32)[:, :, None].swapaxes(-1, -2)
    scores = scores.reshape(b, heads, t, n)
    if isinstance(mask, str):  # "causal": the last query sees every key
        mask = mx.arange(n - t, n)[:, None] >= mx.arange(n)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    if sinks is not None:
        sink = mx.broadcast_to(sinks.astype(mx.float32)[:, None, None], (b, heads, t, 1))
        scores = mx.concatenate([scores, sink], axis=-1)
    return mx.softmax(scores, axis=-1)[..., :n].astype(queries.dtype)


class _Softmax:
    """`mlx.core`, but that `softmax` shows what it gives; for attention spelt out in MLX's ops."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def softmax(self, *args: Any, **kwargs: Any) -> mx.array:
        grouped = mx.softmax(*args, **kwargs)  # [b, heads, t, n] or [b, kv_heads, repeats, t, n]
        pattern = grouped.reshape(grouped.shape[0], -1, *grouped.shape[-2:])
        seen = self._look(pattern)
        return grouped if seen is pattern else seen.reshape(grouped.shape)
