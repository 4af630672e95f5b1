"""In MLX: ours in each precision, plain MLX ops, and the floors that MLX's own product and copy give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.shapes import Shape, Weights
from benchmarks.steps import PlainStep, TrainerStep
from mlxsae import ops


class Ours:
    """The step of ``mlxsae.fit`` (``precision``: :class:`mlxsae.train.TrainConfig`), and its encode with selection alone."""

    def __init__(self, shape: Shape, start: Weights, precision: str, moments: str = "float32"):
        self._trainer = TrainerStep(shape, start, precision=precision, moments=moments)
        self._precision, self._k = precision, shape.k

    def step(self, x: mx.array) -> float:
        return self._trainer.step(x)

    def encode(self, x: mx.array) -> None:
        """After a step, which has made the shadow."""
        arrays = self._trainer.arrays
        w, b = (arrays["params"]["encoder"][name] for name in ("weight", "bias"))
        shadow = arrays.get("shadow")
        if self._precision == "bfloat16" and shadow is not None:
            mx.eval(ops.topk_encode(x.astype(mx.bfloat16), shadow.w16, b, k=self._k))
        else:
            mx.eval(ops.topk_encode(x, w, b, k=self._k, shadow=shadow, tf32=self._precision == "tf32"))


class Floors:
    """The encode product alone, in bfloat16 and in MLX's float32, and a copy of ``copied`` bytes: read and written once."""

    def __init__(self, shape: Shape, start: Weights, copied: int):
        self._w = mx.array(start.w_enc)
        self._w16 = self._w.astype(mx.bfloat16)
        self._copied = mx.zeros((copied // 4,), mx.float32)
        mx.eval(self._w, self._w16, self._copied)

    def bfloat16(self, x: mx.array) -> None:
        mx.eval(mx.matmul(x.astype(mx.bfloat16), self._w16.T))

    def float32(self, x: mx.array) -> None:
        mx.eval(mx.matmul(x, self._w.T))

    def copy(self, x: mx.array) -> None:
        mx.eval(self._copied + 1)


def make(name: str, shape: Shape, start: Weights, copied: int) -> dict[str, Callable[[mx.array], Any]]:
    """What can be timed of a contestant: name -> function of a batch."""
    if name == "floors":
        floors = Floors(shape, start, copied)
        return {"bfloat16 product": floors.bfloat16, "float32 product": floors.float32, "copy": floors.copy}
    if name.startswith("mlx-"):
        return {"step": PlainStep(shape, start, name.removeprefix("mlx-")).step}
    precision, _, low = name.removeprefix("ours-").partition("-moments-")
    ours = Ours(shape, start, precision, low or "float32")
    return {"step": ours.step, "encode": ours.encode}


def batch(x: np.ndarray) -> mx.array:
    out = mx.array(x)
    mx.eval(out)
    return out


def synchronize() -> None:
    mx.synchronize()


def reset_peak_memory() -> None:
    mx.reset_peak_memory()


def peak_memory() -> int:
    return mx.get_peak_memory()


def device() -> dict[str, Any]:
    return {k: v for k, v in mx.device_info().items() if isinstance(v, str | int)}
