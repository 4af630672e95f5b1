"""Mean, variance and norms of activations, from one walk over them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# A chunk stays in a core's cache over the passes that are made, and is short enough for float32 to sum.
_CHUNK_BYTES, _CHUNK_ROWS = 512 << 10, 512


@dataclass(frozen=True)
class Statistics:
    """Of ``rows`` activations ``x [d]``: ``mean [d]``, ``variance [d]`` (population), mean of ``|x|`` and of
    ``|x|^2``. Float64.
    """

    rows: int
    mean: np.ndarray
    variance: np.ndarray
    mean_norm: float
    mean_square_norm: float

    @property
    def scale(self) -> float:
        """``sqrt(d) / mean|x|``: what brings the mean norm to ``sqrt(d)``."""
        return math.sqrt(self.mean.size) / self.mean_norm


class Moments:
    """Accumulates :class:`Statistics`; parts merge exactly (Chan, Golub and LeVeque 1979), each about its own
    mean, so that a mean large against the spread costs no digits.
    """

    def __init__(self, d: int) -> None:
        self.rows = 0
        self.mean = np.zeros(d)
        self.scatter = np.zeros(d)  # sum of squared distances from the mean
        self.norms = np.zeros(2)  # sums of |x| and |x|^2

    def update(self, x: np.ndarray) -> None:
        """Take in rows ``x [n, d]`` of floats."""
        step = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(1, 4 * self.mean.size)))
        for begin in range(0, len(x), step):
            part = self._sums(x[begin : begin + step])
            if not np.isfinite(part[2]).all():  # squares over float32's range, or what is truly not finite
                part = self._sums(x[begin : begin + step].astype(np.float64))
            self.merge(min(step, len(x) - begin), *part)

    @staticmethod
    def _sums(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, scatter and norms of a few rows. Sums of the chunk's own type are exact enough where they are taken about
        a mean that is nearly right, whose distance from the true one is put right."""
        with np.errstate(over="ignore", invalid="ignore"):
            about = chunk.mean(axis=0)
            distance = chunk - about
            off = distance.sum(axis=0) / np.float64(len(chunk))
            scatter = np.einsum("nd,nd->d", distance, distance) - len(chunk) * off * off
            square = np.einsum("nd,nd->n", chunk, chunk).astype(np.float64)
            return about + off, scatter, np.array([np.sqrt(square).sum(), square.sum()])

    def merge(self, rows: int, mean: np.ndarray, scatter: np.ndarray, norms: np.ndarray) -> None:
        """Take in a part with these moments."""
        if rows == 0:
            return
        total = self.rows + rows
        shift = mean - self.mean
        self.scatter = self.scatter + scatter + shift * shift * (self.rows * rows / total)
        self.mean = self.mean + shift * (rows / total)
        self.norms = self.norms + norms
        self.rows = total

    def result(self) -> Statistics:
        if self.rows == 0:
            raise ValueError("[statistics] there must be at least one row but got none.")
        norm, square = (self.norms / self.rows).tolist()
        return Statistics(self.rows, self.mean, np.maximum(self.scatter, 0) / self.rows, norm, square)
