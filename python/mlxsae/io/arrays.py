"""safetensors files: written through any file object, and checked before they are read.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, the data
without holes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from mlxsae.io.atomic import Writer

_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """Where an array lies in a file: its first byte is ``offset``."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    offset: int


def writer(arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> Writer:
    """Writer of ``arrays`` as one safetensors file, an array at a time."""
    spec = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
    return chunked_writer(spec, lambda name: (_as_numpy(arrays[name]),), metadata)


def chunked_writer(
    spec: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> Writer:
    """Writer of arrays that need not exist whole: ``chunks(name)`` gives the pieces of one, in order, when its
    turn comes, as contiguous NumPy arrays (16-bit floats as ``uint16``).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in spec.items():
        begin, end = end, end + math.prod(shape) * dtype.size
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in spec:
            for chunk in chunks(name):
                if chunk.size:
                    file.write(chunk.data.cast("B"))

    return write


def entries(path: str | os.PathLike) -> dict[str, Entry]:
    """What a safetensors file holds, from its header alone. Raises ``ValueError`` that names the fault for a
    damaged file.
    """
    header, start = _header(Path(path))
    return {
        name: Entry(_DTYPES[e["dtype"]], tuple(e["shape"]), start + e["data_offsets"][0])
        for name, e in header.items()
    }


def read(path: str | os.PathLike) -> dict[str, mx.array]:
    """All arrays of a safetensors file, in memory. Raises ``ValueError`` that names the fault for a damaged
    file.
    """
    arrays = {}
    with open(path, "rb") as file:
        for name, (dtype, shape, offset) in entries(path).items():
            file.seek(offset)
            raw = np.fromfile(file, dtype=numpy_dtype(dtype), count=math.prod(shape))
            array = mx.array(raw.reshape(shape))
            arrays[name] = array if array.dtype == dtype else array.view(dtype)
    return arrays


def numpy_dtype(dtype: mx.Dtype) -> Any:
    """NumPy's type for the bits of ``dtype``; 16-bit floats travel as ``uint16``: NumPy has no bfloat16."""
    return _NUMPY.get(dtype, np.uint16)


_NUMPY = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.int8: np.int8,
    mx.uint16: np.uint16,
    mx.int16: np.int16,
    mx.uint32: np.uint32,
    mx.int32: np.int32,
    mx.float32: np.float32,
    mx.uint64: np.uint64,
    mx.int64: np.int64,
}


def _as_numpy(array: mx.array) -> np.ndarray:
    array = mx.contiguous(array)
    return np.ascontiguousarray(np.array(array if array.dtype in _NUMPY else array.view(mx.uint16)))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size

    def fault(what: str) -> ValueError:
        return ValueError(f"[load] {path} must be a whole safetensors file but {what}.")

    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise fault(f"has only {size} bytes")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, _MAX_HEADER):
            raise fault(f"its header claims {length} bytes of a file of {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                offsets, shape = entry["data_offsets"], entry["shape"]
                if entry["dtype"] not in _DTYPES:
                    raise fault(f"{name} has the unknown dtype {entry['dtype']}")
                for sizes in (offsets, shape):
                    if not isinstance(sizes, list) or not all(type(n) is int and n >= 0 for n in sizes):
                        raise fault(f"{name} has the shape {shape!r} and the offsets {offsets!r}")
                if len(offsets) != 2:
                    raise fault(f"{name} has the offsets {offsets!r}")
                begin, stop = offsets
                expected = math.prod(shape) * _DTYPES[entry["dtype"]].size
                if begin != end or stop - begin != expected:
                    raise fault(
                        f"{name} should take bytes {end} to {end + expected} and claims {begin} to {stop}"
                    )
                end = stop
        except (
            UnicodeDecodeError,
            json.JSONDecodeError,
            RecursionError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise fault(f"its header is damaged ({error})") from error
    if size != 8 + length + end:
        raise fault(f"has {size} bytes where its header says {8 + length + end}")
    return header, 8 + length
