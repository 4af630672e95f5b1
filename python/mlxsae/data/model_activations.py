"""Activations of a language model as a stream: of chunks, which fill a shuffling buffer, or of whole contexts in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsae.data.source import Chunk
from mlxsae.lm import HookPoint, LanguageModel, TokenBatch, capture, capture_each, capture_width


class ModelActivations:
    """The activations at one hook point, or several, for batch after batch of tokens, computed when they are asked for.

    Each iteration starts where the last position says, at first at the beginning; at any moment one batch of
    activations exists, on a CPU one for each of up to four cores. To resume, tokens already used are skipped without
    running the model.

    Parameters
    ----------
    lm : LanguageModel
    hook_point : HookPoint, or a tuple of several from one pass
    batches : function without arguments
        Gives a new iterator over the same :class:`~mlxsae.lm.TokenBatch`es each time it is called.

    Yields
    ------
    Chunk
        ``x [b, t, d]``, or a tuple of them in the order of the hook points, and ``valid [b, t]``, False at padding, BOS and other special tokens.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook_point: HookPoint | tuple[HookPoint, ...],
        batches: Callable[[], Iterable[TokenBatch]],
    ) -> None:
        self._lm = lm
        self._several = isinstance(hook_point, tuple)
        self._points = [
            lm.hook_point(p) for p in (hook_point if isinstance(hook_point, tuple) else (hook_point,))
        ]
        self._batches = batches
        self._used = 0

    def __iter__(self) -> Iterator[Chunk]:
        batches = itertools.islice(self._batches(), self._used, None)
        while group := list(itertools.islice(batches, capture_width())):
            found = capture_each(self._lm, [tokens for tokens, _ in group], self._points)
            found.reverse()
            for _, valid in group:
                each = found.pop()
                x = tuple(each[point] for point in self._points)
                del each
                self._used += 1
                yield Chunk(x if self._several else x[0], valid=valid)

    def state(self) -> dict[str, Any]:
        """The position: batches used so far, and the hook point."""
        return {"hook_point": self._name, "used": self._used}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from the position that an equal stream gave."""
        if position["hook_point"] != self._name:
            raise ValueError(
                f"[{type(self).__name__}] to resume, hook_point must be {position['hook_point']} but got {self._name}."
            )
        self._used = int(position["used"])

    @property
    def _name(self) -> str:
        return ", ".join(map(str, self._points))


class ContextActivations(ModelActivations):
    """Whole contexts in order, for losses that ask the rest of the model (:mod:`mlxsae.loss.end_to_end`): a source for
    ``fit`` whose batches are the valid rows of one batch of tokens.

    A batch is ``(x [n, d], tokens [b, t], places [n])``, row i being the activation of ``tokens.reshape(-1)[places[i]]``; of
    two hook points ``(x, y, tokens, places)``. Batches differ in size; the run's ``batch_size`` counts its steps.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook_point: HookPoint | tuple[HookPoint, ...],
        batches: Callable[[], Iterable[TokenBatch]],
    ) -> None:
        super().__init__(lm, hook_point, batches)
        self._left: Iterator[tuple[mx.array, ...] | None] | None = None

    def next_batch(self) -> tuple[mx.array, ...] | None:
        if self._left is None:
            self._left = self._contexts(self._used)
        try:
            for found in self._left:
                self._used += 1
                if found is not None:
                    return found
        except (
            BaseException
        ):  # Ctrl-C in the model's pass: what has raised is at its end, and the text is not
            self._left = None
            raise
        return None

    def sample(self, n: int) -> tuple[mx.array, ...]:
        """The first ``n`` rows."""
        parts: list[tuple[mx.array, ...]] = []
        for found in self._contexts(0):
            if found is not None:
                parts.append(found[:-2])
            if sum(len(part[0]) for part in parts) >= n:
                break
        if not parts:
            raise ValueError("[ContextActivations] there must be at least one valid token but there is none.")
        return tuple(mx.concatenate(list(field))[:n] for field in zip(*parts, strict=True))

    def state(self) -> tuple[dict[str, Any], dict[str, mx.array]]:  # type: ignore[override]
        return super().state(), {}

    def restore(self, position: dict[str, Any], arrays: dict[str, mx.array] | None = None) -> None:
        super().restore(position)
        self._left = None

    def _contexts(self, begin: int) -> Iterator[tuple[mx.array, ...] | None]:
        for tokens, valid in itertools.islice(self._batches(), begin, None):
            places = mx.array(np.flatnonzero(np.array(valid)).astype(np.int32))
            if places.size == 0:
                yield None
                continue
            found = capture(self._lm, tokens, self._points)
            rows = (found[point].reshape(-1, found[point].shape[-1])[places] for point in self._points)
            yield (*(a.astype(mx.float32) for a in rows), tokens, places)
