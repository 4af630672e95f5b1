"""Read and edit activations of an MLX model without touching its parameter tree.

A module is hooked by giving that one object a subclass of its own class whose `__call__` consults the hooks
of the running context. Python looks `__call__` up on the type, so nothing lighter works; `isinstance`, the
parameters, quantised and tied weights stay as they are, and a forward pass without edits runs the very same
operations on the very same arrays.

The hooks themselves live in a context variable: they act in the thread or asyncio task that entered the
`with` block and in no other, even while another one runs the same model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .families import family_of, locate, resolve, resolve_all
from .hook_point import ByPoint, HookPoint, HookPointLike, Point
from .pattern import opened
from .text import valid_rows

if TYPE_CHECKING:
    from .language_model import LanguageModel

Code = TypeVar("Code")
Edit = Callable[[mx.array], mx.array]
Edits = Mapping[Any, Edit]  # keys: HookPointLike, spelt Any as Mapping is invariant in its keys
# The hooks of one `with` block: id of a module -> kind -> function. "before" and "after" map the activation
# [b, t, d] that the module gets and gives, "input" and "output" an array of any shape; "pattern" maps the
# attention pattern; "keep" has a block remember its input, for "mid" to map (resid_pre, attn_out) to attn_out;
# "end" is told the module's first argument once it has returned.
_Hook = Callable[..., mx.array]
_Frame = dict[int, dict[str, _Hook]]

_frames: ContextVar[tuple[_Frame, ...]] = ContextVar("mlxsae_lm_frames", default=())
_resid_pre: ContextVar[mx.array | None] = ContextVar("mlxsae_lm_resid_pre", default=None)


class _Stop(BaseException):
    """Everything that was asked for is there; a BaseException, so that no model swallows it."""


def _apply(fns: list[_Hook], x: mx.array) -> mx.array:
    """Run hook functions one after the other, with all hooks off: a function may itself call the model."""
    token = _frames.set(())
    try:
        for fn in fns:
            x = fn(x)
        return x
    finally:
        _frames.reset(token)


def _call(base: type, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`base.__call__(module, *args, **kwargs)` with the hooks of this context around it."""
    call: Callable[..., Any] = base.__call__  # type: ignore[attr-defined]
    fns: dict[str, list[_Hook]] = {}
    for frame in _frames.get():
        for kind, fn in frame.get(id(module), {}).items():
            fns.setdefault(kind, []).append(fn)
    if not fns:
        return call(module, *args, **kwargs)

    if fns.keys() & {"before", "keep", "input"}:
        x = args[0] if args else None
        if not isinstance(x, mx.array) or (x.ndim != 3 and fns.keys() & {"before", "keep"}):
            what = "an array" if fns.keys() <= {"input", "output"} else "its activation [b, t, d]"
            got = f"shape {x.shape}" if isinstance(x, mx.array) else "no such argument"
            raise ValueError(
                f"[hooks] {base.__module__}.{base.__name__} must get {what} first but got {got}."
            )
        args = (_apply([*fns.get("before", ()), *fns.get("input", ())], x), *args[1:])
    if "pattern" in fns:
        call = opened(call, partial(_apply, fns["pattern"]))
    if "keep" in fns:  # resid_mid is made of the block's input and its attention's output
        token = _resid_pre.set(args[0])
        try:
            y = call(module, *args, **kwargs)
        finally:
            _resid_pre.reset(token)
    else:
        y = call(module, *args, **kwargs)

    if fns.keys() & {"after", "mid"}:
        y = _map_first(
            [*fns.get("after", ()), *(partial(fn, _resid_pre.get()) for fn in fns.get("mid", ()))], y, base, 3
        )
    if "output" in fns:
        y = _map_first(fns["output"], y, base)
    for end in fns.get("end", ()):
        end(*args[:1])
    return y


def _map_first(fns: list[_Hook], y: Any, base: type, ndim: int | None = None) -> Any:
    """What a module returns, or the first where it returns several, through `fns`."""
    x = y[0] if isinstance(y, (tuple, list)) and y else y
    if not isinstance(x, mx.array) or (ndim is not None and x.ndim != ndim):
        what = "an array" if ndim is None else "[b, t, d]"
        got = f"shape {x.shape}" if isinstance(x, mx.array) else type(x).__name__
        raise ValueError(f"[hooks] {base.__module__}.{base.__name__} must return {what} but gave {got}.")
    mapped = _apply(fns, x)
    if x is y:
        return mapped
    rest: list[Any] = list(y)[1:]
    return type(y)(mapped, *rest) if hasattr(y, "_replace") else type(y)([mapped, *rest])  # NamedTuple or not


@cache
def _hooked(base: type) -> type:
    """The subclass of `base` that a hooked module wears."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _call(base, self, args, kwargs)

    body = {"__call__": __call__, "__module__": base.__module__, "_mlxsae_base": base}
    return type(base.__name__, (base,), body)


_lock = threading.Lock()
_wearers: dict[int, tuple[nn.Module, int]] = {}  # id -> module (kept alive, so the id stays its own), users


def _wear(modules: Iterable[nn.Module]) -> None:
    with _lock:
        for module in modules:
            _, users = _wearers.get(id(module), (module, 0))
            if not hasattr(type(module), "_mlxsae_base"):
                object.__setattr__(module, "__class__", _hooked(type(module)))
            _wearers[id(module)] = (module, users + 1)


def _undress(modules: Iterable[nn.Module]) -> None:
    with _lock:
        for module in modules:
            _, users = _wearers.pop(id(module))
            if users > 1:
                _wearers[id(module)] = (module, users - 1)
            elif "_mlxsae_base" in vars(
                type(module)
            ):  # else someone swapped it since; ours, beneath, passes through
                object.__setattr__(module, "__class__", type(module)._mlxsae_base)  # type: ignore[attr-defined]


def network(model: nn.Module | LanguageModel) -> nn.Module:
    """The mlx-lm model itself, given it or the `LanguageModel` around it."""
    from .language_model import LanguageModel

    return model.model if isinstance(model, LanguageModel) else model


class Hooks:
    """Edits of a model, made ready once: `worn` while they may act, `active` while they do.

    They act in the context that enters `active`, after those of the `with` blocks around it.
    """

    def __init__(self, model: nn.Module, edits: Mapping[Point, Edit]) -> None:
        self._frame: _Frame = {}
        self._modules: dict[int, nn.Module] = {}
        for point, edit in edits.items():
            module, kind, block = locate(model, point)
            if kind == "mid":
                self.add(block, "keep", edit, point)
                self.add(module, kind, partial(_through_sum, family_of(model).add, edit), point)
            else:
                self.add(module, kind, edit, point)

    def add(self, module: nn.Module, kind: str, fn: Callable[..., Any], point: Point | str) -> None:
        if kind != "keep" and kind in self._frame.get(id(module), {}):
            raise ValueError(f"[hooks] {point} is computed by the same module as an earlier block's.")
        self._frame.setdefault(id(module), {})[kind] = fn
        self._modules[id(module)] = module

    @contextmanager
    def worn(self) -> Iterator[None]:
        _wear(self._modules.values())
        try:
            yield
        finally:
            _undress(self._modules.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        _frames.set((*_frames.get(), self._frame))
        try:
            yield
        finally:
            # By identity and not by token: a generator may leave in another context than it entered.
            _frames.set(tuple(other for other in _frames.get() if other is not self._frame))


@contextmanager
def watched(model: nn.Module, end: Callable[[mx.array], Any]) -> Iterator[None]:
    """Have `end(tokens)` called after every whole forward pass of `model` in this context."""
    hooks = Hooks(model, {})
    hooks.add(model, "end", end, "the model")
    with hooks.worn(), hooks.active():
        yield


@contextmanager
def _hooks(model: nn.Module, edits: Mapping[Point, Edit]) -> Iterator[None]:
    """Have `edits` act on `model` in this context."""
    hooks = Hooks(model, edits)
    with hooks.worn(), hooks.active():
        yield


def _through_sum(
    add: Callable[[mx.array, mx.array], mx.array], edit: Edit, resid_pre: mx.array, attn_out: mx.array
) -> mx.array:
    """An edit of `resid_mid`, put into effect through the one summand that the block will still add."""
    resid_mid = add(resid_pre, attn_out)
    edited = edit(resid_mid)
    return attn_out if edited is resid_mid else edited - resid_pre


def _same_shape(hook_point: Point, edit: Edit) -> Edit:
    def fn(x: mx.array) -> mx.array:
        y = edit(x)
        if not isinstance(y, mx.array) or y.shape != x.shape:
            got = f"shape {y.shape}" if isinstance(y, mx.array) else type(y).__name__
            raise ValueError(f"[splice] the edit at {hook_point} must return shape {x.shape} but gave {got}.")
        return y if y.dtype == x.dtype else y.astype(x.dtype)

    return fn


@contextmanager
def splice(model: nn.Module | LanguageModel, edits: Edits) -> Iterator[None]:
    """Replace activations while the `with` block lasts.

    Parameters
    ----------
    model : LanguageModel, an mlx-lm model, or any `mlx.nn` module
    edits : {hook point: function}
        Each function gets the activation [b, t, d] and returns the one that takes its place, of the same
        shape; the result is cast to the activation's dtype. With a KV cache, t counts the new tokens only.
        Hook points in any spelling that names the layer, or modules by their path (`resolve`).

    Inside, the plain `model(tokens, cache=...)` is edited, and so is everything built on it, such as mlx-lm's
    `generate`. Blocks nest: an inner one sees what the outer one left. An exception leaves the model as it
    was. Only the thread or asyncio task that entered sees the edits. While an edit runs, all hooks are off,
    so it may call the model itself. A function compiled by `mx.compile` keeps whatever it was traced with.

    An edit of `resid_mid` reaches the rest of the block up to one rounding of the residual sum.

    Raises
    ------
    ValueError
        A hook point that the model does not have, or, from the forward pass, an edit that changes the shape.
    """
    net = network(model)
    with _hooks(net, checked(net, edits)):
        yield


def checked(model: nn.Module, edits: Edits) -> dict[Point, Edit]:
    """`edits` by their points, each made to refuse what is not an activation of the shape it got."""
    parsed: dict[Point, Edit] = {}
    for spec, edit in edits.items():
        hook_point = resolve(model, spec)
        if hook_point in parsed:
            raise ValueError(f"[splice] each hook point must be given once but got {hook_point} twice.")
        if not callable(edit):
            raise ValueError(
                f"[splice] the edit at {hook_point} must be callable but got {type(edit).__name__}."
            )
        parsed[hook_point] = _same_shape(hook_point, edit)
    return parsed


def _forward(
    model: nn.Module | LanguageModel,
    tokens: Any,
    hook_points: HookPointLike | Iterable[HookPointLike],
    kv_cache: list[Any] | None,
    stop: bool,
) -> tuple[Any, ByPoint[mx.array]]:
    """Logits (None where the pass was cut short) and captured activations, all lazy."""
    net = network(model)
    wanted = resolve_all(net, hook_points)
    if not wanted:
        raise ValueError("[capture] hook_points must name at least one hook point but got none.")
    if any(isinstance(point, HookPoint) for point in wanted):
        _check_tokens(tokens)
    found: dict[Point, mx.array] = {}

    def keep(hook_point: Point, x: mx.array) -> mx.array:
        if hook_point in found:
            raise RuntimeError(f"[capture] {hook_point} was computed twice in one forward pass.")
        found[hook_point] = x
        if stop and len(found) == len(wanted):
            raise _Stop
        return x

    logits = None
    inputs = tokens if isinstance(tokens, tuple) else (tokens,)
    with _hooks(net, {hook_point: partial(keep, hook_point) for hook_point in wanted}), suppress(_Stop):
        logits = net(*inputs) if kv_cache is None else net(*inputs, cache=kv_cache)  # type: ignore[operator]
    if missing := [str(hook_point) for hook_point in wanted if hook_point not in found]:
        raise RuntimeError(f"[capture] the forward pass never reached {', '.join(missing)}.")
    return logits, ByPoint((hook_point, found[hook_point]) for hook_point in wanted)


def _check_tokens(tokens: Any) -> None:
    if not isinstance(tokens, mx.array) or tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        got = (
            f"{tokens.dtype} of shape {tokens.shape}"
            if isinstance(tokens, mx.array)
            else type(tokens).__name__
        )
        raise ValueError(f"[capture] tokens must be integers of shape [b, t] but got {got}.")


def capture(
    model: nn.Module | LanguageModel,
    tokens: mx.array | tuple[mx.array, ...],
    hook_points: HookPointLike | Iterable[HookPointLike],
    *,
    cache: list[Any] | None = None,
) -> ByPoint[mx.array]:
    """Activations at `hook_points`, from one forward pass that ends as soon as it has them all.

    Parameters
    ----------
    model : LanguageModel, an mlx-lm model, or any `mlx.nn` module
    tokens : int [b, t]
        Pad short rows on the right: attention is causal, so padding changes nothing to its left. For a module
        that is no language model, its argument, or a tuple of them.
    hook_points : one or several
        Any spelling that names the layer, see `HookPoint.parse`, or the path of a module, see `resolve`.
    cache : list, optional
        mlx-lm's prompt cache. The pass then runs to the end, for a cache must be filled in every layer.

    Returns
    -------
    dict of point to array
        In the order asked for, in the model's dtype, evaluated, holding on to nothing else of the pass. It
        takes every spelling of its keys. Under `splice` they are the edited activations.

    Raises
    ------
    ValueError
        Tokens of another shape or kind; a hook point that the model does not have.
    """
    logits, found = _forward(model, tokens, hook_points, cache, stop=cache is None)
    mx.eval(list(found.values()), [] if logits is None else logits)
    return found


def capture_each(
    model: nn.Module | LanguageModel,
    batches: Sequence[mx.array | tuple[mx.array, ...]],
    hook_points: HookPointLike | Iterable[HookPointLike],
) -> list[ByPoint[mx.array]]:
    """As `capture` of one batch after another, bit for bit, computed side by side on a CPU.

    MLX computes a stream of a CPU on one thread, its products apart; each batch gets a stream of its own. Give as
    many as `capture_width` says.
    """
    found = []
    for tokens, stream in zip(batches, _side_streams(len(batches)), strict=True):
        with mx.stream(stream):
            found.append(_forward(model, tokens, hook_points, None, stop=True)[1])
    mx.eval([list(each.values()) for each in found])
    return found


def capture_width() -> int:
    """How many batches `capture_each` computes at a time: one on a GPU, on a CPU at most four, one a core."""
    if mx.default_device() != mx.cpu:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def _side_streams(n: int) -> list[mx.Stream]:
    """`n` streams of the default device, the same ones at each call: MLX keeps a thread for each, for good."""
    device = mx.default_device()
    streams: list[mx.Stream] = _side.__dict__.setdefault(str(device), [mx.default_stream(device)])
    streams += (mx.new_stream(device) for _ in range(n - len(streams)))
    return streams[:n]


_side = threading.local()  # a stream serves the thread that made it


def capture_codes(
    model: nn.Module | LanguageModel,
    tokens: mx.array,
    encoders: Mapping[Any, Callable[[mx.array], Code]],
    *,
    valid: mx.array | None = None,
) -> ByPoint[Code]:
    """As `capture`, but gives what `encoders` make of the activations, which are themselves dropped.

    Parameters
    ----------
    encoders : {hook point: function}
        Such as `{"blocks.3.hook_resid_post": sae.encode}`; gets the activation [b, t, d], or the rows [n, d]
        of valid tokens where `valid` is given.
    valid : bool [b, t], optional
        As `token_batches` and `tokenize` give it: no other token is encoded.
    """
    points = {resolve(network(model), spec): encode for spec, encode in encoders.items()}
    _, found = _forward(model, tokens, list(points), None, stop=True)
    codes: ByPoint[Code] = ByPoint()
    for point, encode in points.items():
        x = found.pop(point)
        codes[point] = encode(x if valid is None else valid_rows(x, valid))
    mx.eval(list(codes.values()))
    return codes


def run_with_capture(
    model: nn.Module | LanguageModel,
    tokens: mx.array | tuple[mx.array, ...],
    hook_points: HookPointLike | Iterable[HookPointLike],
    *,
    cache: list[Any] | None = None,
) -> tuple[mx.array, ByPoint[mx.array]]:
    """Logits [b, t, vocab] and the activations at `hook_points`, from one whole forward pass.

    As `capture`; the logits are the plain model's, bit for bit. Everything is lazy, so that it can be
    differentiated: evaluate what you keep, all at once.
    """
    logits, found = _forward(model, tokens, hook_points, cache, stop=False)
    assert logits is not None
    return logits, found


def only_at(edit: Edit, where: mx.array) -> Edit:
    """`edit` at the positions where `where` (bool [b, t]) is true, the activation itself elsewhere.

    For edits that make no sense on padding, BOS or special tokens, such as an SAE that never saw any:
    `splice(lm, {"blocks.2.hook_resid_post": only_at(sae, valid)})`.
    """
    return lambda x: mx.where(of_tokens(where, x), edit(x).astype(x.dtype), x)


def of_tokens(where: mx.array, x: mx.array) -> mx.array:
    """`where` [b, t] or [1, t] shaped to choose tokens of an activation [b, t, d] or a pattern [b, heads, t, n]."""
    return where[:, None, :, None] if x.ndim == 4 else where[..., None]
