"""MLX's contestants: ours, and plain MLX ops."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.shapes import Shape, Weights
from benchmarks.steps import OurStep, PlainStep, TrainerStep
from mlxsae import ops
from mlxsae.sae import BatchTopK


def _batch(x: np.ndarray) -> mx.array:
    array = mx.array(x)
    mx.eval(array)
    return array


class Ours:
    def __init__(self, shape: Shape, start: Weights, *, certified: bool = False):
        self._step = OurStep(shape, start, certified=certified)
        self._shape = shape
        self.timed = {
            "step": self._step.step,
            "step without the b_dec path": partial(self._step.step, b_dec_path=False),
            "step with clipping": partial(self._step.step, clip_norm=1.0),
            "step with AuxK": partial(self._step.step, auxk=True),
            "encode": self._step.encode,
            "matmul": self._matmul,
        }
        self.phases = self._step.phases
        self.parameters = self._step.parameters

    batch = staticmethod(_batch)

    def _matmul(self, x: mx.array) -> None:
        mx.eval(x @ self._step.params.w_enc.T)


class Trainer(TrainerStep):
    def __init__(self, shape: Shape, start: Weights, **options: Any):
        super().__init__(shape, start, **options)
        self._k = shape.k
        self.timed = {"step": self.step}

    batch = staticmethod(_batch)

    def select(self, x: mx.array) -> np.ndarray:
        p = self.arrays["params"]
        centred = x - p["decoder"]["bias"]
        return np.array(
            ops.topk_encode(centred, p["encoder"]["weight"], p["encoder"]["bias"], k=self._k).indices
        )


class Large(Trainer):
    """For shapes whose weights and moments fill the machine: the floor is made of the very weights that are trained."""

    PARTS = 8

    def __init__(self, shape: Shape, start: Weights):
        super().__init__(shape, start)
        self._product = np.empty((shape.n, shape.d_sae // self.PARTS), np.float32)
        self.timed["OpenBLAS, in parts"] = self._products

    def _products(self, x: mx.array) -> None:
        # A view, gone before the next step: one that stays would make the update copy the weights.
        rows = np.array(self.arrays["params"]["encoder"]["weight"], copy=False)
        for part in np.split(rows, self.PARTS):
            np.matmul(np.array(x, copy=False), part.T, out=self._product)


def batchtopk(shape: Shape, start: Weights, *, precision: str = "float32") -> Trainer:
    return Trainer(shape, start, rule=BatchTopK, precision=precision)


class _Plain(PlainStep):
    decode: str

    def __init__(self, shape: Shape, start: Weights):
        super().__init__(shape, start, self.decode)
        self.timed = {"step": self.step}

    batch = staticmethod(_batch)


class PlainDense(_Plain):
    decode = "dense"


class PlainGather(_Plain):
    decode = "gather"
