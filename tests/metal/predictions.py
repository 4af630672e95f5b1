"""Times of the Metal kernels on Apple GPUs, *predicted* from the traffic that the harness counts: `python tests/metal/predictions.py`.

An op's plan runs in counted mode with the width and k of a benchmark shape but few tokens or features, chunked as at the shape. The
bytes that simdgroups ask of each buffer are a sum of terms in the number of tokens and features (`Op.terms`), fitted exactly, and so
carried to the shape. Then, with a device's float32 rate F32, bandwidth BW and system cache C (`DEVICES`),

    products  = sum over matrix products of max(2 n m d / F32, 4 (n d + m d + n m) / BW)
    slowest   = products + bytes asked of all buffers / BW
    fastest   = products + (bytes asked of buffers larger than C + sizes of the others) / BW

Left out: launches (each costs microseconds), the kernels' own arithmetic, the cache's bandwidth, clocks that fall. Writes docs/metal.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [
        str(Path(__file__).parent),
        str(Path(__file__).parents[1]),
        str(Path(__file__).parents[2]),
    ]

import msl
import numpy as np
import run_plan
from benchmarks.shapes import SHAPES, Shape

DOC = Path(__file__).resolve().parents[2] / "docs/metal.md"
BEGIN, END = "<!-- predictions: begin -->", "<!-- predictions: end -->"


@dataclass(frozen=True)
class Device:
    """An Apple GPU: its name in the plans, what it sustains, and its row of csrc/gpu/device.cpp."""

    name: str
    gpu: str
    bandwidth: float  # bytes a second
    flops: float  # float32 operations a second
    cache: int  # bytes of the system level cache
    chunk_bytes: int
    simdgroups: int
    source: str


MIB = 1 << 20
DEVICES = (
    Device("M2 Max", "applegpu_g14s", 400e9, 13.6e12, 48 * MIB, 32 * MIB, 360, "38 cores, nominal"),
    Device("M4 Max", "applegpu_g16s", 546e9, 16.2e12, 48 * MIB, 32 * MIB, 384, "40 cores x 128 x 2 x 1.58 GHz, nominal"),
    Device("M5", "applegpu_g17g", 122e9, 3.76e12, 12 * MIB, 8 * MIB, 120, "10 cores, measured by others; matrix units do not take float32"),
)  # fmt: skip


@dataclass(frozen=True)
class Op:
    """An op: its plan's sizes and inputs at a shape, the bytes it must move, the terms of what it moves, and where to count."""

    name: str
    note: str
    sizes: Callable[[Shape], dict[str, Any]]
    inputs: Callable[[Shape], list[np.ndarray]]
    least: Callable[[Shape], float]
    terms: tuple[Callable[[Shape], float], ...]
    count_at: tuple[tuple[int, int | None], ...]  # (n, d_sae or the shape's), as many as terms
    chunked: bool = False  # the plan depends on the device

    def plan(self, s: Shape, device: Device, **overrides: int) -> dict[str, Any]:
        return run_plan.plan(self.name, gpu=device.gpu, **self.sizes(s), **overrides)

    def count(self, s: Shape, device: Device, scale: float = 1.0) -> tuple[dict[str, int], msl.Counts]:
        """Bytes asked of each buffer of the plan, and all counts. `scale`: tokens here over those of the shape that is meant."""
        overrides = {}
        if self.chunked:
            overrides = {
                "chunk_bytes": int(device.chunk_bytes * scale),
                "simdgroups": max(1, int(device.simdgroups * scale)),
            }
        plan = self.plan(s, device, **overrides)
        asked: dict[str, int] = {}
        total = msl.Counts()

        def add(step: Mapping[str, Any], report: msl.Report) -> None:
            nonlocal total
            assert report.counts is not None
            total += report.counts
            arguments = run_plan.library(step["library"], "counted").kernels[step["kernel"]].buffers
            for index, buffer, _, _ in step["bindings"]:
                if buffer >= 0:
                    name = plan["buffers"][buffer]["name"]
                    asked[name] = asked.get(name, 0) + report.counts.buffers[arguments[index].name].bytes

        run_plan.run(plan, self.inputs(s), mode="counted", on_launch=add)
        return asked, total

    def predict(self, s: Shape, device: Device) -> Work:
        """The op's work at a large shape, from counts at small ones."""
        small = [Shape(n, s.d_in, f or s.d_sae, s.k) for n, f in self.count_at]
        counted = [self.count(c, device, c.n / s.n) for c in small]
        matrix = np.array([[term(c) for term in self.terms] for c in small], np.float64)
        at_shape = np.linalg.solve(matrix.T, np.array([term(s) for term in self.terms], np.float64))
        names = set().union(*(asked for asked, _ in counted))
        asked = {b: float(at_shape @ [a.get(b, 0) for a, _ in counted]) for b in names}

        plan = self.plan(s, device)
        sizes = {
            b["name"]: b["size"] * np.dtype(run_plan.DTYPES[b["type"]]).itemsize for b in plan["buffers"]
        }
        fast = sum(x if sizes[b] > device.cache else min(x, sizes[b]) for b, x in asked.items())
        products = 0.0
        for step in plan["steps"]:
            if "matmul" in step:
                n, m, d = (step[x] for x in "nmd")
                products += max(2 * n * m * d / device.flops, 4 * (n * d + m * d + n * m) / device.bandwidth)
        lines = [c.traffic for _, c in counted]
        return Work(
            asked=sum(asked.values()),
            least=self.least(s),
            efficiency=sum(t.bytes - t.scalar_bytes for t in lines)
            / sum(128 * t.transactions for t in lines),
            launches=sum("matmul" not in step for step in plan["steps"]),
            products=products,
            fastest=products + fast / device.bandwidth,
            slowest=products + sum(asked.values()) / device.bandwidth,
        )


@dataclass(frozen=True)
class Work:
    """Bytes that an op's kernels ask for and the least that the algorithm must move; times in seconds."""

    asked: float
    least: float
    efficiency: float
    launches: int
    products: float
    fastest: float
    slowest: float


def _code(s: Shape) -> tuple[np.ndarray, np.ndarray]:
    """k different features a token, all firing."""
    rng = np.random.default_rng([s.n, s.d_sae])
    indices = np.stack([np.sort(rng.permutation(s.d_sae)[: s.k]) for _ in range(s.n)]).astype(np.uint32)
    return rng.uniform(0.1, 1, (s.n, s.k)).astype(np.float32), indices


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def _coded(s: Shape) -> dict[str, Any]:
    return {"n": s.n, "k": s.k, "room": s.n * s.k, "compressed": False, "values": "float", "d_sae": s.d_sae}


def _decoded(s: Shape) -> dict[str, Any]:
    return _coded(s) | {"d": s.d_in, "aligned": True, "bias": True}


def _encoded(s: Shape) -> dict[str, Any]:
    flags = {
        "exact": True,
        "shadow": False,
        "aligned": True,
        "aligned_bias": True,
        "type": "float",
        "k_aux": 0,
    }
    return {"n": s.n, "d_in": s.d_in, "d_sae": s.d_sae, "k": s.k} | flags


def _updated(s: Shape) -> dict[str, Any]:
    learning = {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "step_size": 1e-3,
        "inv_sqrt_bias": 1.0,
        "clip_norm": 0.0,
        "step": 1,
        "moments": "float",
    }
    flags = {
        "terms": 1,
        "shadow": False,
        "aligned": True,
        "project": True,
        "normalize": True,
        "through_input": True,
        "keep_encoder": False,
        "keep_decoder": False,
    }
    return _coded(s) | {"d_in": s.d_in, "d_out": s.d_in} | learning | flags


def _update_inputs(s: Shape) -> list[np.ndarray]:
    w = _random(s.d_sae, s.d_in)
    parameters = [w, _random(s.d_sae), w / np.linalg.norm(w, axis=1, keepdims=True), _random(s.d_in)]
    moments = [0.1 * p for p in parameters] + [0.1 * p * p for p in parameters]
    values, indices = _code(s)
    one = np.ones(1, np.float32)
    return [_random(s.n, s.d_in), one, _random(s.n, s.d_in), values, indices, one, *parameters, *moments]


def _n(s: Shape) -> float:
    return s.n


def _features(s: Shape) -> float:
    return s.d_sae


OPS = (
    Op(
        "topk_encode", "float32, exact; the product by MLX's matmul in chunks", _encoded,
        lambda s: [_random(s.n, s.d_in), _random(s.d_sae, s.d_in), _random(s.d_sae)],
        lambda s: 4 * s.n * s.d_sae + 8 * s.n * s.k,
        (_n, _features), ((16, None), (32, None)), chunked=True,
    ),
    Op(
        "sparse_decode", "with bias", lambda s: _decoded(s) | {"w": "float", "bias_type": "float"},
        lambda s: [*_code(s), _random(s.d_sae, s.d_in), _random(s.d_in)],
        lambda s: s.n * s.k * (4 * s.d_in + 8) + 4 * s.n * s.d_in,
        (_n,), ((16, 256),),
    ),
    Op(
        "decode_residual", "with residual and squared error", _decoded,
        lambda s: [*_code(s), _random(s.d_sae, s.d_in), _random(s.n, s.d_in), _random(s.d_in)],
        lambda s: s.n * s.k * (4 * s.d_in + 8) + 8 * s.n * s.d_in,
        (_n,), ((16, 256),),
    ),
    Op(
        "feature_update", "backward, projection, Adam, renorm of every feature", _updated, _update_inputs,
        lambda s: 48 * s.d_sae * s.d_in + 8 * s.n * s.k + 4 * s.n * s.d_in,
        (_n, _features), ((16, 128), (16, 256)),
    ),
    Op(
        "tokens_since_fired", "dead-feature bookkeeping", lambda s: _coded(s) | {"n_tokens": s.n},
        lambda s: [np.zeros(s.d_sae, np.int32), *_code(s)],
        lambda s: 8 * s.d_sae + 8 * s.n * s.k,
        (_n, _features), ((64, 512), (64, 4096)),
    ),
)  # fmt: skip


def _scaled(x: float, *units: str) -> str:
    """Three digits and a unit of thousands."""
    x = float(f"{x:.2e}")
    thousands = min(max(0, math.floor(math.log10(x) / 3)), len(units) - 1)
    x /= 1000**thousands
    return f"{x:.{max(0, 2 - max(0, math.floor(math.log10(x))))}f} {units[thousands]}"


def table(shape: str) -> str:
    """Predictions at a benchmark shape, as Markdown. Counts are those of the first device's plan."""
    s = SHAPES[shape]
    lines = [f"**{shape}**: n = {s.n:,}, d_in = {s.d_in:,}, d_sae = {s.d_sae:,}, k = {s.k}", ""]
    lines += [
        "| op | must move | asked for | coalescing | launches | " + " | ".join(d.name for d in DEVICES) + " |"
    ]
    lines += ["| --- |" + " ---: |" * (4 + len(DEVICES))]
    for op in OPS:
        work = [op.predict(s, d) for d in DEVICES]
        first = work[0]
        times = [
            f"{_scaled(1e6 * w.fastest, 'µs', 'ms', 's')} to {_scaled(1e6 * w.slowest, 'µs', 'ms', 's')}"
            for w in work
        ]
        cells = [f"`{op.name}`", *(_scaled(x, "B", "kB", "MB", "GB") for x in (first.least, first.asked))]
        cells += [f"{100 * first.efficiency:.0f} %", str(first.launches), *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render(shapes: tuple[str, ...] = ("S1", "S2")) -> str:
    devices = ["| device | bandwidth | float32 | system cache | from |", "| --- | ---: | ---: | ---: | --- |"]
    for d in DEVICES:
        row = (
            f"{d.bandwidth / 1e9:.0f} GB/s | {d.flops / 1e12:.2f} TFLOP/s | {d.cache // MIB} MiB | {d.source}"
        )
        devices.append(f"| {d.name} | {row} |")
    notes = "\n".join(f"- `{op.name}`: {op.note}." for op in OPS)
    return "\n\n".join([*map(table, shapes), notes, "\n".join(devices)])


def main() -> None:
    head, _, rest = DOC.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOC.write_text(f"{head}{BEGIN}\n{render()}\n{END}{tail}")


if __name__ == "__main__":
    main()
