"""The shapes that every benchmark uses, and the data of a contest: the same numbers in every process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    n: int
    d_in: int
    d_sae: int
    k: int

    @property
    def gemm_flop(self) -> int:
        return 2 * self.n * self.d_in * self.d_sae

    @property
    def n_params(self) -> int:
        return 2 * self.d_sae * self.d_in + self.d_sae + self.d_in

    @property
    def extra_bytes_allowed(self) -> int:
        """Memory that a float32 step may take beyond parameters, moments and the batch."""
        return (64 << 20) + 64 * self.n * self.k + 12 * self.n * self.d_in


SHAPES = {
    "S0": Shape(256, 512, 8192, 32),
    "S1": Shape(1024, 1024, 16384, 32),
    "S1x4": Shape(4096, 1024, 16384, 32),
    "S2": Shape(1024, 2048, 32768, 64),
    "S3": Shape(4096, 4096, 131072, 64),
    "S4": Shape(8192, 4096, 262144, 64),
    "S5": Shape(4096, 4096, 1048576, 128),
}


class Weights(NamedTuple):
    w_enc: np.ndarray  # [d_sae, d_in]
    b_enc: np.ndarray  # [d_sae]
    w_dec: np.ndarray  # [d_sae, d_in], rows of unit norm
    b_dec: np.ndarray  # [d_in]


def weights(shape: Shape, seed: int = 0) -> Weights:
    """A tied start, as the field initialises: unit rows, encoder = decoder, small biases so that no term vanishes."""
    rng = np.random.default_rng([seed, 0])
    w = rng.standard_normal((shape.d_sae, shape.d_in), dtype=np.float32)
    for row in range(0, shape.d_sae, 4096):
        block = w[row : row + 4096]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    b_enc = 0.01 * rng.standard_normal(shape.d_sae, dtype=np.float32)
    b_dec = 0.01 * rng.standard_normal(shape.d_in, dtype=np.float32)
    return Weights(w, b_enc, w.copy(), b_dec)


def batch(shape: Shape, index: int, seed: int = 0) -> np.ndarray:
    """Fresh Gaussian activations ``[n, d_in]`` of step ``index``."""
    return np.random.default_rng([seed, 1, index]).standard_normal((shape.n, shape.d_in), dtype=np.float32)
