"""How a gradient is taken: in micro-batches, in bfloat16 over float32 masters, with activations computed twice."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxsae.sae import TiedDecoder
from mlxsae.train.config import TrainConfig
from mlxsae.train.randomness import fork

LossOf = Callable[..., tuple[mx.array, dict[str, mx.array], Any]]
"""``(params, frozen, x, y, carried) -> (total, terms, carried)``: what is carried goes from part to part."""


def value_and_grad(loss_of: LossOf, config: TrainConfig, *, eager: bool) -> Callable[..., tuple[tuple, Any]]:
    """``mx.value_and_grad(loss_of)``, as ``config`` wants it taken.

    ``gradient_accumulation_steps = A`` splits the rows into A equal parts: value and gradient are the means of the
    parts', and only one part's graph is alive at a time where ``eager`` (outside ``mx.compile``). With
    ``mixed_precision`` the function sees parameters and ``x`` in bfloat16 (a rule's own parameters, its thresholds,
    stay float32, and so does the target); gradients arrive in float32 at the float32 masters. bfloat16 has float32's
    range, so no loss scaling is needed.
    """
    function = _in_bfloat16(loss_of) if config.mixed_precision else loss_of
    one = mx.value_and_grad(function)
    parts = config.gradient_accumulation_steps
    if parts == 1:
        return one

    def accumulated(params: Any, frozen: Any, x: mx.array, y: mx.array, carried: Any) -> tuple[tuple, Any]:
        n = min(parts, x.shape[0])  # the last batch of a stream may be short
        bounds = [i * x.shape[0] // n for i in range(n + 1)]
        total: Any = None
        for begin, end in itertools.pairwise(bounds):
            # Parts of a short batch may differ by a row: each weighs by its rows.
            share = (end - begin) / x.shape[0]
            rows = x[begin:end]
            (value, terms, carried), gradient = one(
                params, frozen, rows, rows if y is x else y[begin:end], carried
            )
            scaled = tree_map(lambda a, share=share: a * share, (value, terms, gradient))
            total = scaled if total is None else tree_map(mx.add, total, scaled)
            if eager:
                mx.async_eval(total, carried)  # lets go of this part's activations
        return (total[0], total[1], carried), total[2]

    return accumulated


def _in_bfloat16(loss_of: LossOf) -> LossOf:
    def low(tree: Any) -> Any:
        return tree_map(lambda a: a.astype(mx.bfloat16) if mx.issubdtype(a.dtype, mx.floating) else a, tree)

    def function(params: Any, frozen: Any, x: mx.array, y: mx.array, *rest: Any) -> tuple:
        trees = [{k: v if k == "rule" else low(v) for k, v in tree.items()} for tree in (params, frozen)]
        total, terms, carried = loss_of(*trees, low(x), y, *rest)
        return total.astype(mx.float32), tree_map(lambda a: a.astype(mx.float32), terms), carried

    return function


@contextlib.contextmanager
def recomputed(module: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block every layer of ``module`` forgets its intermediates and computes them again in the backward
    pass (gradient checkpointing): memory for time.

    Layers are the direct children of ``module``, and those of an ``nn.Sequential`` among them. Acts by changing the
    class of each for the length of the block; parameters and results stay the same. Dropout draws the same mask twice.
    """
    changed: list[tuple[nn.Module, type]] = []
    try:
        for layer in _layers(module) if active else ():
            changed.append((layer, type(layer)))
            layer.__class__ = _forgetful(type(layer))
        yield
    finally:
        for layer, kind in reversed(changed):
            layer.__class__ = kind


def _layers(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []

    def collect(value: Any) -> None:
        if isinstance(value, nn.Sequential):
            collect(value.layers)
        elif isinstance(value, nn.Module):
            # A tied decoder's weight is the encoder's: computed again with its own parameters, it would give that none.
            forgets = callable(value) and not isinstance(value, TiedDecoder)
            if forgets and all(value is not f for f in found):
                found.append(value)
        elif isinstance(value, (list, tuple)):
            for v in value:
                collect(v)
        elif isinstance(value, dict):
            collect(list(value.values()))

    collect(list(module.children().values()))
    return found


_FORGETFUL: dict[type, type] = {}


def _forgetful(kind: type) -> type:
    if kind not in _FORGETFUL:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            draw_again = fork()

            def inner(params: Any, *args: Any, **kwargs: Any) -> Any:
                draw_again()
                self.update(params)
                return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]

            own = self.trainable_parameters()
            try:
                return mx.checkpoint(inner)(own, *args, **kwargs)
            finally:
                self.update(own)

        _FORGETFUL[kind] = type(kind.__name__, (kind,), {"__call__": call})
    return _FORGETFUL[kind]
