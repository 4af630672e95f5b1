"""What a step is held against: the encode product alone by each library here, and memory bandwidth."""

from __future__ import annotations

import os

import numpy as np

from benchmarks.machine import BandwidthProbe
from benchmarks.shapes import Shape, Weights


class TorchProducts:
    """``x @ W_enc [d_in, d_sae]`` as PyTorch does it (MKL), in both layouts of the weights, and by oneDNN."""

    def __init__(self, shape: Shape, start: Weights):
        import torch

        torch.set_grad_enabled(False)
        self._rows = torch.from_numpy(start.w_enc)
        self._columns = self._rows.T.contiguous()
        self.batch = torch.from_numpy
        self.timed = {
            "matmul": lambda x: _nothing(torch.matmul(x, self._columns)),
            "matmul, transposed weights": lambda x: _nothing(torch.matmul(x, self._rows.T)),
            "oneDNN": lambda x: _nothing(
                torch.ops.mkldnn._linear_pointwise(x, self._rows, None, "none", [], "")
            ),
        }


class NumPyProduct:
    """``x @ w_enc.T`` by NumPy's OpenBLAS, in both layouts of the weights, into memory that stays."""

    def __init__(self, shape: Shape, start: Weights):
        self._rows = start.w_enc
        self._columns = np.ascontiguousarray(start.w_enc.T)
        self._out = np.ones((shape.n, shape.d_sae), np.float32)
        self.timed = {
            "OpenBLAS": lambda x: _nothing(np.matmul(x, self._columns, out=self._out)),
            "OpenBLAS, transposed weights": lambda x: _nothing(np.matmul(x, self._rows.T, out=self._out)),
        }

    @staticmethod
    def batch(x: np.ndarray) -> np.ndarray:
        return x


class Probe:
    def __init__(self, shape: Shape, start: Weights):
        # As large as one weight matrix, and never so small that a cache holds it.
        floats = min(max(shape.d_sae * shape.d_in, 1 << 24), 1 << 26)
        self._probe = BandwidthProbe(floats, int(os.environ["OMP_NUM_THREADS"]))
        self.timed = {}
        self.native = self._probe.native

    @staticmethod
    def batch(x: np.ndarray) -> np.ndarray:
        return x

    def bandwidth(self) -> float:
        return self._probe.bytes_per_second()


def _nothing(_: object) -> None:
    return None
