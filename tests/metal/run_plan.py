"""Executes a GPU plan (csrc/gpu/plan.h) here: kernels on the harness, matrix products in NumPy.

A plan is the very data that the Metal adapter executes on a Mac, so what runs here is the whole op: grids, bindings, constants and
chunks as well as the kernels' text. `plan` names it, `run` executes it, `counted` counts what its kernels do.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msl
import numpy as np

from mlxsae import _ext

METAL = Path(__file__).resolve().parents[2] / "metal"

DTYPES = {
    "float": np.float32,
    "half": np.float16,
    "bfloat": np.uint16,  # NumPy has no such type: its bits
    "int": np.int32,
    "uint": np.uint32,
    "long": np.int64,
    "bool": np.bool_,
}
# Bytes that no result may depend on: NaN as a float, and far out of every range as an index.
GARBAGE = 0xFF
# Orders of the threads: one after the other, at random, and simdgroup by simdgroup.
SCHEDULES = (0, 1, 2)


def to_float(a: np.ndarray) -> np.ndarray:
    """Floats of any type as float32."""
    return msl.bfloat16.unpack(a) if a.dtype == np.uint16 else a.astype(np.float32)


def from_float(a: np.ndarray, type: str) -> np.ndarray:
    """float32 rounded to "float", "half" or "bfloat", to nearest, ties to even."""
    with np.errstate(over="ignore"):
        return msl.bfloat16.pack(a) if type == "bfloat" else np.asarray(a, np.float32).astype(DTYPES[type])


def plan(op: str, *, gpu: str = "applegpu_g14s", **sizes: int | float | str) -> dict[str, Any]:
    """The plan of an op on an Apple GPU, from the sizes and types that csrc/gpu/<op>.h names."""
    given = {k: v if isinstance(v, (str, float)) else int(v) for k, v in sizes.items()}
    return json.loads(_ext.gpu_plan(op, given, gpu=gpu))


@functools.cache
def library(name: str, mode: str) -> msl.Library:
    return msl.load(METAL / f"{name}.metal", include=[METAL], mode=mode)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b^T rounded to the type of the operands, as a product of 16-bit matrices on a GPU is. In float64 before that, so that
    it does not depend on which columns are asked for together, as it would in float32 with some BLAS."""
    names = {np.dtype(np.float32): "float", np.dtype(np.float16): "half", np.dtype(np.uint16): "bfloat"}
    with np.errstate(all="ignore"):
        exact = to_float(a).astype(np.float64) @ to_float(b).astype(np.float64).T
        return from_float(exact.astype(np.float32), names[a.dtype])


def run(
    plan: Mapping[str, Any],
    inputs: list[np.ndarray],
    *,
    mode: str = "checked",
    schedule: int = 0,
    donate: bool = False,
    libraries: Mapping[str, msl.Library] | None = None,
    matmul: Callable[[np.ndarray, np.ndarray], np.ndarray] = product,
    on_launch: Callable[[Mapping[str, Any], msl.Report], None] | None = None,
    temporaries: dict[str, np.ndarray] | None = None,
) -> list[np.ndarray]:
    """The outputs, flat, of a plan on flat copies of `inputs`.

    donate: outputs lie in the memory of the inputs that they may take; else in their own. Everything that is not an input starts as
    garbage. `on_launch(step, report)` sees each launch's report; `temporaries` takes the temporaries by name; `libraries` stand in for
    files of metal/.
    """
    given = iter(inputs)
    arrays: list[np.ndarray] = []
    written: set[int] = set()  # buffers that hold something
    for b in plan["buffers"]:
        dtype = np.dtype(DTYPES[b["type"]])
        if b["role"] == "input":
            a = np.ascontiguousarray(next(given)).reshape(-1).copy()
            if a.dtype != dtype or a.size != b["size"]:
                raise TypeError(
                    f"[run_plan] {b['name']} must be {dtype} of {b['size']} elements but got {a.dtype} of {a.size}."
                )
        elif donate and b["donor"] >= 0:
            a = arrays[b["donor"]]
        else:
            a = np.full(b["size"] * dtype.itemsize, GARBAGE, np.uint8).view(dtype)
        arrays.append(a)
        if b["role"] == "input" or (donate and b["donor"] >= 0):
            written.add(len(arrays) - 1)
        if temporaries is not None and b["role"] == "temporary":
            temporaries[b["name"]] = a
    for step in plan["steps"]:
        if "matmul" in step:
            a, b = (arrays[i] for i in step["matmul"][:2])
            n, m, d, first = (step[x] for x in ("n", "m", "d", "first"))
            arrays[step["matmul"][2]][: n * m] = matmul(
                a[: n * d].reshape(n, d), b[first * d : (first + m) * d].reshape(m, d)
            ).reshape(-1)
            written.add(step["matmul"][2])
            continue
        lib = (libraries or {}).get(step["library"]) or library(step["library"], mode)
        declared = lib.kernels[step["kernel"]].buffers
        buffers: dict[int, Any] = {}
        for i, b, offset, _ in step["bindings"]:
            array = arrays[b][offset:] if b >= 0 else None
            raw = array is not None and declared[i].element == "int8"  # char*: the type is an argument
            buffers[i] = array.view(np.int8) if raw else array
        buffers |= {i: DTYPES[t](v) for i, t, v in step["arguments"]}
        report = lib.launch(
            step["kernel"],
            buffers,
            groups=tuple(step["groups"]),
            threadgroup=tuple(step["threads"]),
            constants={i: DTYPES[t](v) for i, t, v in step["constants"]},
            schedule=schedule,
            undefined=[i for i, b, _, writes in step["bindings"] if writes and b not in written],
        )
        written |= {b for _, b, _, writes in step["bindings"] if writes}
        if on_launch:
            on_launch(step, report)
    return [a for a, b in zip(arrays, plan["buffers"], strict=True) if b["role"] == "output"]


def run_in_every_schedule(
    plan: Mapping[str, Any], inputs: list[np.ndarray], **options: Any
) -> list[np.ndarray]:
    """The outputs of a plan, which must have the same bits in whatever order the threads run."""
    first, *others = (run(plan, inputs, schedule=s, **options) for s in SCHEDULES)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    return first


def counted(plan: Mapping[str, Any], inputs: list[np.ndarray], **options: Any) -> dict[str, msl.Counts]:
    """Counted work of each kernel of a plan, its launches added up."""
    total: dict[str, msl.Counts] = {}

    def add(step: Mapping[str, Any], report: msl.Report) -> None:
        assert report.counts is not None
        total[step["kernel"]] = total.get(step["kernel"], msl.Counts()) + report.counts

    run(plan, inputs, mode="counted", on_launch=add, **options)
    return total
