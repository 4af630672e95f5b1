"""Steps in MLX: ours in each precision, plain MLX ops, and the floors that MLX's own product and copy give."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.shapes import Shape, Weights
from benchmarks.steps import OurStep, PlainStep
from mlxsae import SparseCode, ops


class Ours(OurStep):
    """``precision`` names how the encoder multiplies; parameters, moments and the update are float32 in each.

    float32: MLX's float32 product, which is TF32 on NVIDIA, screens; results are those of float32. certified: a bfloat16 product
    screens, the same results. bfloat16: selection and values are those of the bfloat16 product (fast, not exact).
    """

    def __init__(self, shape: Shape, start: Weights, precision: str):
        super().__init__(shape, start)
        self.precision = precision
        self.shadow = None if precision == "float32" else ops.encoder_shadow(self.params.w_enc)
        mx.eval(self.shadow or [])

    def _encode(self, x: mx.array, auxk: bool) -> tuple[mx.array, tuple[SparseCode, ...]]:
        centred = x - self.params.b_dec
        if self.shadow is not None and self.precision == "bfloat16":
            code = ops.topk_encode(
                centred.astype(mx.bfloat16), self.shadow.w16, self.params.b_enc, k=self.shape.k
            )
            return centred, (SparseCode(code.values.astype(mx.float32), code.indices),)
        code = ops.topk_encode(
            centred, self.params.w_enc, self.params.b_enc, k=self.shape.k, shadow=self.shadow
        )
        return centred, (code,)

    def encode_only(self, x: mx.array) -> None:
        self.encode(x)


class Products:
    """The encode product alone, in bfloat16 and float32, and a copy of 2 GiB."""

    def __init__(self, shape: Shape, start: Weights):
        self._w = mx.array(start.w_enc)
        self._w16 = self._w.astype(mx.bfloat16)
        self._copied = mx.zeros((1 << 29,), mx.float32)
        mx.eval(self._w, self._w16, self._copied)

    def bfloat16(self, x: mx.array) -> None:
        mx.eval(mx.matmul(x.astype(mx.bfloat16), self._w16.T))

    def float32(self, x: mx.array) -> None:
        mx.eval(mx.matmul(x, self._w.T))

    def copy_of_2_gib(self, x: mx.array) -> None:
        mx.eval(self._copied + 1)  # read once, written once


def make(name: str, shape: Shape, start: Weights) -> dict[str, Any]:
    """What can be timed of a contestant: name -> function of a batch."""
    if name == "floors":
        floors = Products(shape, start)
        return {
            "bfloat16 product": floors.bfloat16,
            "float32 product": floors.float32,
            "copy of 2 GiB": floors.copy_of_2_gib,
        }
    if name == "mlx-dense":
        return {"step": PlainStep(shape, start, "dense").step}
    ours = Ours(shape, start, name.removeprefix("ours-"))
    return {"step": ours.step, "encode": ours.encode_only}


def batch(x: np.ndarray) -> mx.array:
    out = mx.array(x)
    mx.eval(out)
    return out


def synchronize() -> None:
    mx.synchronize()


def peak_memory() -> int:
    return mx.get_peak_memory()


def device() -> dict[str, Any]:
    return {k: v for k, v in mx.device_info().items() if isinstance(v, str | int)}
