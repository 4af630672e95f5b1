"""How activations are stored: as floats, or as int8 with a scale for every 128 numbers of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxsae import ops
from mlxsae.io import arrays as array_files

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16, "int8": mx.int8}
SCALE_GROUP = 128
"""Neighbouring numbers that share an int8 scale: an outlier dimension coarsens only those beside it."""


@dataclass(frozen=True)
class Stream:
    """The activations of one hook point: width, and one of ``DTYPES``."""

    d: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"[activations] dtype must be one of {', '.join(DTYPES)} but got {self.dtype!r}."
            )

    def fields(self, name: str) -> dict[str, tuple[mx.Dtype, int]]:
        """The arrays that hold stream ``name``: type and numbers per row."""
        found = {name: (DTYPES[self.dtype], self.d)}
        if self.dtype == "int8":
            found[f"{name}.scales"] = (mx.float32, -(-self.d // SCALE_GROUP))
        return found

    @property
    def row_bytes(self) -> int:
        return sum(dtype.size * width for dtype, width in self.fields("").values())


def encode(name: str, stream: Stream, x: mx.array) -> dict[str, np.ndarray]:
    """Rows ``x [n, d]`` as the bits of their fields.

    int8: ``q = round(x / s)`` with ``s = max|x| / 127`` over each group, so ``|x - q s| <= s / 2``. NaN and
    infinity come back as NaN.

    Raises
    ------
    ValueError : a finite number that float16 cannot hold.
    """
    if stream.dtype != "int8":
        stored = x.astype(DTYPES[stream.dtype])
        if stream.dtype == "float16" and bool(mx.any(mx.isinf(stored) & ~mx.isinf(x)).item()):
            raise ValueError(
                f"[activations] dtype must hold every activation of {name} but float16 ends at 65,504; "
                "use bfloat16."
            )
        return {name: bits(stored)}
    n, groups = x.shape[0], -(-stream.d // SCALE_GROUP)
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, groups * SCALE_GROUP - stream.d)])
    x = x.reshape(n, groups, SCALE_GROUP)
    scales = mx.abs(x).max(axis=-1) / 127
    q = mx.round(x / mx.where(scales == 0, 1.0, scales)[..., None]).astype(mx.int8)
    return {name: bits(q.reshape(n, -1)[:, : stream.d]), f"{name}.scales": bits(scales)}


def decode(name: str, stream: Stream, fields: Mapping[str, mx.array]) -> mx.array:
    """Rows ``[n, d]`` of what :func:`encode` gave: in the stored float type, float32 for int8."""
    stored = fields[name]
    if stream.dtype != "int8":
        return stored
    scales = mx.repeat(fields[f"{name}.scales"], SCALE_GROUP, axis=-1)[:, : stream.d]
    return stored.astype(mx.float32) * scales


def to_float32(name: str, stream: Stream, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """As :func:`decode`, in NumPy and float32: for threads that must not touch MLX."""
    raw = fields[name]
    match stream.dtype:
        case "bfloat16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        case "float16":
            return raw.view(np.float16).astype(np.float32)
        case "int8":
            scales = np.repeat(fields[f"{name}.scales"], SCALE_GROUP, axis=-1)[:, : stream.d]
            with np.errstate(invalid="ignore"):  # NaN scales are meant to spread
                return raw.astype(np.float32) * scales
        case _:
            return raw


def bits(a: mx.array) -> np.ndarray:
    """The bits of ``a`` as a contiguous NumPy array; 16-bit floats as ``uint16``."""
    if a.dtype in (mx.float16, mx.bfloat16):
        a = a.view(mx.uint16)
    return np.ascontiguousarray(np.array(a, copy=False))


def blank(rows: int, dtype: mx.Dtype, width: int) -> tuple[mx.array, np.ndarray]:
    """An MLX array ``[rows, width]`` and a view of its memory, to be filled from anywhere before it is used."""
    raw = ops.unwritten((rows, width), mx.uint16 if dtype in (mx.float16, mx.bfloat16) else dtype)
    view = np.array(raw, copy=False)
    assert view.dtype == array_files.numpy_dtype(dtype)
    return (raw if raw.dtype == dtype else raw.view(dtype)), view
