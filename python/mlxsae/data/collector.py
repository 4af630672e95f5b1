"""Activations of forward passes that somebody else runs: a context manager around them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae.lm import HookPoint, LanguageModel, TokenBatch, splice, valid_rows
from mlxsae.lm.hooks import network, watched


class ActivationCollector:
    """Keeps the activations of every forward pass within the ``with`` block, up to ``max_activations`` tokens: those of
    the thread or asyncio task that entered it, as with ``splice``.

        with ActivationCollector(model, ["blocks.3.hook_resid_post"], max_activations=100_000) as collector:
            for tokens, valid in batches:
                collector.valid = valid  # where a batch has padding
                model(tokens)
        x = collector.get_activations()["blocks.3.hook_resid_post"]  # [n, d]

    Rows of BOS, padding and other special tokens of a ``LanguageModel`` with a tokenizer are left out, and with
    ``valid`` (bool ``[b, t]``, for the next pass only) whatever it says; other models have no special tokens that
    we could know of, but ``special_ids`` may name them. Padding with an ordinary token cannot be told from text:
    give ``valid`` then.

    Parameters
    ----------
    model : LanguageModel or an mlx-lm model
        Called with tokens ``[b, t]`` first, as all of them are.
    hook_points : one or several, any spelling that names the layer
    max_activations : further passes run and are not kept; ``collector.full`` tells.
    """

    def __init__(
        self,
        model: LanguageModel | nn.Module,
        hook_points: Any,
        max_activations: int | None = None,
        *,
        special_ids: Iterable[int] = (),
    ) -> None:
        if max_activations is not None and max_activations < 1:
            raise ValueError(
                f"[ActivationCollector] max_activations must be positive but got {max_activations}."
            )
        self._points = _parsed(hook_points)
        self._model = model
        known = isinstance(model, LanguageModel) and model.tokenizer is not None
        self._special = sorted({*special_ids, *(model.special_ids if known else ())})  # type: ignore[union-attr]
        self._most = max_activations
        self._rows: dict[str, list[mx.array]] = {str(point): [] for point in self._points}
        self._pass: dict[str, mx.array] = {}
        self._block: ExitStack | None = None
        self.valid: mx.array | np.ndarray | None = None
        self.count = 0

    @property
    def full(self) -> bool:
        return self._most is not None and self.count >= self._most

    def __enter__(self) -> Self:
        if self._block is not None:
            raise RuntimeError("[ActivationCollector] a collector must be entered once at a time.")
        with ExitStack() as stack:
            stack.enter_context(splice(self._model, {p: self._keep(str(p)) for p in self._points}))
            stack.enter_context(watched(network(self._model), self._end_of_pass))
            self._block = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        self._pass.clear()
        if block is not None:
            block.__exit__(kind, error, trace)

    def get_activations(self) -> dict[str, mx.array]:
        """``{name: [n, d]}``, the rows of different hook points in the same order. Empty before the first pass."""
        for name, parts in self._rows.items():
            if len(parts) > 1:
                self._rows[name] = [mx.concatenate(parts)]
        mx.eval(self._rows)
        return {name: parts[0] for name, parts in self._rows.items() if parts}

    def _keep(self, name: str) -> Any:
        def edit(x: mx.array) -> mx.array:
            self._pass[name] = x
            return x

        return edit

    def _end_of_pass(self, tokens: mx.array) -> None:
        kept, self._pass = self._pass, {}
        given, self.valid = self.valid, None
        if self.full or not kept:
            return
        mask = ~np.isin(np.array(tokens), self._special)
        if given is not None:
            given = np.array(given)
            if given.shape != mask.shape or given.dtype != np.bool_:
                raise ValueError(
                    f"[ActivationCollector] valid must be bool of shape {mask.shape} but got {given.dtype} {given.shape}."
                )
            mask &= given
        if self._most is not None:
            flat = mask.reshape(-1)
            flat &= np.cumsum(flat) <= self._most - self.count
        self.count += int(mask.sum())
        where = mx.array(mask)  # type: ignore[arg-type]
        rows = {name: valid_rows(x, where) for name, x in kept.items()}
        mx.eval(rows)  # lets go of the pass
        for name, x in rows.items():
            self._rows[name].append(x)


def _parsed(hook_points: Any) -> list[HookPoint]:
    one = isinstance(hook_points, (str, HookPoint)) or (
        isinstance(hook_points, tuple) and any(isinstance(part, int) for part in hook_points)
    )
    several: Any = [hook_points] if one else hook_points
    return [HookPoint.parse(point) for point in several]


def collect_activations_from_dataloader(
    model: LanguageModel | nn.Module,
    dataloader: Iterable[Any],
    hook_points: Any,
    max_activations: int | None = None,
) -> dict[str, mx.array]:
    """Activations of batches of tokens ``[b, t]``, or of ``TokenBatch``es, as :class:`ActivationCollector` keeps
    them. In memory; ``ActivationDataset`` is for more than fits.
    """
    with ActivationCollector(model, hook_points, max_activations) as collector:
        for batch in dataloader:
            tokens, collector.valid = batch if isinstance(batch, TokenBatch) else (mx.array(batch), None)
            model(tokens)
            if collector.full:
                break
    return collector.get_activations()


def collect_activations(
    model: LanguageModel, hook_point: Any, texts: Iterable[str], *, max_activations: int = 100_000
) -> mx.array:
    """Activations ``[n, d]`` of ``texts`` at one hook point, in memory."""
    from mlxsae.data.dataset import ActivationDataset

    made = ActivationDataset.from_texts(
        model, texts, hook_points=[hook_point], max_samples=max_activations, shuffle=False
    )
    return next(made.batches(len(made), shuffle=False))
