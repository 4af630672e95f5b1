"""Times a training step of each contestant on this machine's GPU: ``python -m benchmarks.gpu.run --shape S3 S4``.

Each contestant runs in a process of its own, on the same start and the same fresh batches: synchronised wall time, the median after a
warm-up that covers compilation. Contestants whose packages are missing, or whose memory does not suffice, are named with the reason.
Results and what of the design's bars they meet go to ``benchmarks/results/step-<device>.json`` after every contestant.
``--dry-run`` tries all of it out on a tiny shape, on a CPU too.

Beside ``mlx[cuda13]`` and torch it wants ``eai-sparsify`` and github.com/openai/sparse_autoencoder (for its kernels).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.shapes import SHAPES, Shape, batch, weights

CONTESTANTS = {
    "floors": "mlx_steps",
    "ours-bfloat16": "mlx_steps",
    "ours-bfloat16-moments-bfloat16": "mlx_steps",
    "ours-certified": "mlx_steps",
    "ours-tf32": "mlx_steps",
    "ours-float32": "mlx_steps",
    "mlx-dense": "mlx_steps",
    "mlx-gather": "mlx_steps",
    "torch-dense": "torch_steps",
    "torch-dense-compiled": "torch_steps",
    "sparsify": "torch_steps",
    "openai": "torch_steps",
}
OURS_ONLY = {"S5"}  # a dense step runs out of memory there
PACKAGES = (
    "mlxsae", "mlx", "mlx-cpu", "mlx-cuda-13", "nvidia-cuda-nvrtc", "nvidia-cublas", "torch", "triton", "eai-sparsify",
    "sparse_autoencoder", "numpy",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "results"
DRY = Shape(64, 32, 256, 4)
SECONDS_ALLOWED = 1800


def copied_bytes(shape: Shape) -> int:
    """Of the copy that tells the memory's bandwidth: 2 GiB, and no more than a shape's weights."""
    return min(2 << 30, 4 * shape.d_sae * shape.d_in)


def state_bytes(shape: Shape, moments: int = 4) -> int:
    """Parameters and Adam's moments, of so many bytes a number."""
    return (4 + 2 * moments) * shape.n_params


def measure(name: str, shape: Shape, warmup: int, steps: int) -> dict[str, Any]:
    """Seconds of each thing of a contestant that can be timed, in this process."""
    room = importlib.import_module(f"benchmarks.gpu.{CONTESTANTS[name]}")
    timed = room.make(name, shape, weights(shape), copied_bytes(shape))
    out: dict[str, Any] = {"seconds": {}, "device": room.device()}
    for what, function in timed.items():
        seconds, values = [], []
        for i in range(warmup + steps):
            x = room.batch(batch(shape, i))
            room.synchronize()
            if i == warmup and what == "step":
                room.reset_peak_memory()  # the start came through the host, perhaps twice
            start = time.perf_counter()
            values.append(function(x))
            room.synchronize()
            seconds.append(time.perf_counter() - start)
        out["seconds"][what] = seconds[warmup:]
        if what == "step":
            out["losses"], out["peak_memory"] = values, room.peak_memory()
    return out


def summary(shape: Shape, results: dict[str, Any]) -> dict[str, float]:
    """The ratios that the design asks for, where their parts were measured."""
    medians = {
        (name, what): statistics.median(seconds)
        for name, r in results.items()
        for what, seconds in r.get("seconds", {}).items()
    }
    steps = {name: seconds for (name, what), seconds in medians.items() if what == "step"}
    out: dict[str, float] = {}
    product, copy = (medians.get(("floors", what)) for what in ("bfloat16 product", "copy"))
    if product and copy:
        out["bandwidth, bytes per second"] = bandwidth = 2 * copied_bytes(shape) / copy
        out["floor, seconds"] = floor = product + 48 * shape.d_sae * shape.d_in / bandwidth
        for (name, what), seconds in medians.items():
            if what == "encode":
                out[f"{name}, encode over the bfloat16 product"] = seconds / product
        for name, seconds in steps.items():
            out[f"{name} over the floor"] = seconds / floor
    if ours := steps.get("ours-bfloat16"):
        for name, seconds in steps.items():
            out[f"{name} over ours-bfloat16"] = seconds / ours
    for name in steps:
        if peak := results[name].get("peak_memory"):
            low = 2 if name.endswith("moments-bfloat16") else 4
            out[f"{name}, memory over parameters and moments"] = peak / state_bytes(shape, low)
        # The very first loss comes before any step: it says whether all compute the same.
        if name != "sparsify" and (other := results.get("ours-float32", {}).get("losses")):
            out[f"{name}, first loss over ours-float32"] = results[name]["losses"][0] / other[0]
    return out


def bars(shape: str, found: dict[str, float], results: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold at S3 and S5 (and is worth knowing elsewhere): the bar, what was found, whether it is met; None where
    a part of it was not measured."""

    def bar(
        what: str, value: float | None, least: float = -math.inf, most: float = math.inf
    ) -> dict[str, Any]:
        limit = {"at least": least} if most == math.inf else {"at most": most}
        return {
            "what": what,
            "found": value,
            **limit,
            "met": None if value is None else least <= value <= most,
        }

    dense = [
        v
        for n in ("torch-dense", "torch-dense-compiled")
        if (v := found.get(f"{n} over ours-bfloat16")) is not None
    ]
    get = found.get
    losses = [v for n, r in results.items() if n.startswith("ours") for v in r.get("losses", [])]
    finite = float(all(map(math.isfinite, losses))) if losses else None
    return [
        {"shape": shape, **row}
        for row in (
            bar("encode in bfloat16 over the bare product", get("ours-bfloat16, encode over the bfloat16 product"), most=1.15),
            bar("certified encode over the bare bfloat16 product", get("ours-certified, encode over the bfloat16 product"), most=1.6),
            bar("the faster dense PyTorch step over ours", min(dense, default=None), least=3.2),
            bar("sparsify's step over ours", get("sparsify over ours-bfloat16"), least=2.0),
            bar("our step over the floor", get("ours-bfloat16 over the floor"), most=1.3),
            bar("our memory over parameters and moments", get("ours-bfloat16, memory over parameters and moments"), most=1.15),
            bar("every loss of ours is finite", finite, least=1.0),
        )
    ]  # fmt: skip


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def in_a_process(contestant: str, shape: str, warmup: int, steps: int) -> dict[str, Any]:
    """What :func:`measure` gives in a process of its own, or why it gave nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--only", contestant, "--shape", shape]
    command += ["--warmup", str(warmup), "--steps", str(steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_ALLOWED)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {SECONDS_ALLOWED} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    shapes = SHAPES | {"dry": DRY}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=shapes, default=["S2", "S3", "S4", "S5"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape, two steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument(
        "--only", choices=CONTESTANTS, help=argparse.SUPPRESS
    )  # one contestant, in this process
    a = parser.parse_args(arguments)
    if a.dry_run:
        a.shape, a.warmup, a.steps = ["dry"], 1, 2
    if a.only:
        print(json.dumps(measure(a.only, shapes[a.shape[0]], a.warmup, a.steps)))
        return
    report: dict[str, Any] = {
        "device": "unknown",
        "driver": driver(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": machine.versions(*PACKAGES),
        "MLX_ENABLE_TF32": os.environ.get("MLX_ENABLE_TF32", "1"),
        "warmup": a.warmup,
        "steps": a.steps,
        "shapes": {},
    }
    path = a.out / "step-unknown.json"
    for shape in a.shape:
        results: dict[str, Any] = {}
        for contestant in a.contestants or CONTESTANTS:
            if shape in OURS_ONLY and not contestant.startswith(("ours", "floors")):
                continue
            results[contestant] = in_a_process(contestant, shape, a.warmup, a.steps)
            print(shape, contestant, results[contestant].get("failed", "ok"), file=sys.stderr)
            if (
                device := results[contestant].get("device", {}).get("device_name")
            ) and path.stem == "step-unknown":
                report["device"] = device
                path = a.out / f"step-{machine.slug(device.removeprefix('NVIDIA '))}.json"
            found = summary(shapes[shape], results)
            sizes = shapes[shape]._asdict()
            report["shapes"][shape] = {
                "sizes": sizes, "summary": found, "bars": bars(shape, found, results), "results": results,
            }  # fmt: skip
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
