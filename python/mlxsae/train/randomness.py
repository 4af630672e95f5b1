"""Randomness of a run: every step begins from a key of its own, so nothing of it has to be stored."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

_MASK = 2**64 - 1


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """MLX's global random state after the block is that from before it."""
    state: Any = mx.random.state
    high, low = (int(word) for word in np.array(state[0]))
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def seed_step(seed: int, step: int, stream: int = 0) -> None:
    """Put MLX's global random state where step ``step`` of a run with ``seed`` begins. ``stream`` keeps users of one
    step apart."""
    _forks.begin(_mixed(_mixed(_mixed(seed & _MASK) ^ step) ^ stream))


class _Forks(threading.local):
    """Where the random state of this thread's step began, and how often it has forked since."""

    key, count = 0, 0

    def begin(self, key: int) -> None:
        self.key, self.count = key, 0
        mx.random.seed(key)


_forks = _Forks()


def fork() -> Callable[[], None]:
    """A function that puts the random state to one place of its own each time it is called: what is computed twice
    draws the same numbers twice."""
    _forks.count += 1
    key = _mixed(_forks.key ^ _forks.count)
    return lambda: mx.random.seed(key)


def _mixed(z: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): neighbours come out unrelated."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
