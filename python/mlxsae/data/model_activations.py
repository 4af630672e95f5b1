"""Activations of a language model as a stream of chunks: what fills a shuffling buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlxsae.data.source import Chunk
from mlxsae.lm import HookPoint, LanguageModel, TokenBatch, capture


class ModelActivations:
    """The activations at one hook point, or several, for batch after batch of tokens, computed when they are asked for.

    Each iteration starts where the last position says, at first at the beginning; at any moment one batch of
    activations exists. To resume, tokens already used are skipped without running the model.

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
        for tokens, valid in itertools.islice(self._batches(), self._used, None):
            found = capture(self._lm, tokens, self._points)
            x = tuple(found[point] for point in self._points)
            del found
            self._used += 1
            yield Chunk(x if self._several else x[0], valid=valid)

    def state(self) -> dict[str, Any]:
        """The position: batches used so far, and the hook point."""
        return {"hook_point": self._name, "used": self._used}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from the position that an equal stream gave."""
        if position["hook_point"] != self._name:
            raise ValueError(
                f"[ModelActivations] to resume, hook_point must be {position['hook_point']} but got {self._name}."
            )
        self._used = int(position["used"])

    @property
    def _name(self) -> str:
        return ", ".join(map(str, self._points))
