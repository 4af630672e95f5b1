"""Times a training step of each contestant on this machine's GPU: ``python -m benchmarks.gpu.run --shape S3 S4``.

Each contestant runs in a process of its own, on the same start and the same fresh batches: synchronised wall time, the median after a
warm-up that covers compilation. Contestants whose packages are missing, or whose memory does not suffice, are named with the reason.
Results go to ``benchmarks/results/step-<device>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.shapes import SHAPES, batch, weights

CONTESTANTS = {
    "floors": "mlx_steps",
    "ours-bfloat16": "mlx_steps",
    "ours-certified": "mlx_steps",
    "ours-float32": "mlx_steps",
    "mlx-dense": "mlx_steps",
    "torch-dense": "torch_steps",
    "torch-dense-compiled": "torch_steps",
    "openai": "torch_steps",
    "sparsify": "torch_steps",
}
PACKAGES = ("mlxsae", "mlx", "mlx-cuda-13", "torch", "triton", "eai-sparsify", "sparse_autoencoder", "numpy")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def measure(name: str, shape: str, warmup: int, steps: int) -> dict[str, Any]:
    """Seconds of each thing of a contestant that can be timed, in this process."""
    room = importlib.import_module(f"benchmarks.gpu.{CONTESTANTS[name]}")
    timed = room.make(name, SHAPES[shape], weights(SHAPES[shape]))
    out: dict[str, Any] = {"seconds": {}, "device": room.device()}
    for what, function in timed.items():
        seconds, values = [], []
        for i in range(warmup + steps):
            x = room.batch(batch(SHAPES[shape], i))
            room.synchronize()
            start = time.perf_counter()
            values.append(function(x))
            room.synchronize()
            seconds.append(time.perf_counter() - start)
        out["seconds"][what] = seconds[warmup:]
        if what == "step":
            out["losses"] = values
    out["peak_memory"] = room.peak_memory()
    return out


def summary(shape: str, results: dict[str, Any]) -> dict[str, float]:
    """The ratios that the design asks for, where their parts were measured."""
    medians = {
        (name, what): statistics.median(seconds)
        for name, r in results.items()
        for what, seconds in r.get("seconds", {}).items()
    }
    s, out = SHAPES[shape], {}
    product, copy = (medians.get(("floors", w)) for w in ("bfloat16 product", "copy of 2 GiB"))
    if product and copy:
        bandwidth = 2 * (2 << 30) / copy
        floor = product + 48 * s.d_sae * s.d_in / bandwidth
        out |= {"floor_seconds": floor, "bandwidth": bandwidth}
        for precision in ("bfloat16", "certified"):
            if encode := medians.get((f"ours-{precision}", "encode")):
                out[f"encode, {precision}, over the bfloat16 product"] = encode / product
        for (name, what), seconds in medians.items():
            if what == "step":
                out[f"{name} over the floor"] = seconds / floor
    if ours := medians.get(("ours-bfloat16", "step")):
        for (name, what), seconds in medians.items():
            if what == "step":
                out[f"{name} over ours-bfloat16"] = seconds / ours
    return out


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["S2", "S3"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one contestant, in this process
    a = parser.parse_args()
    if a.only:
        print(json.dumps(measure(a.only, a.shape[0], a.warmup, a.steps)))
        return
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "driver": driver(),
        "python": platform.python_version(),
        "versions": machine.versions(*PACKAGES),
        "shapes": {},
    }
    name = "unknown"
    for shape in a.shape:
        results: dict[str, Any] = {}
        for contestant in a.contestants:
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu.run",
                "--only",
                contestant,
                "--shape",
                shape,
                "--warmup",
                str(a.warmup),
                "--steps",
                str(a.steps),
            ]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode == 0:
                results[contestant] = json.loads(process.stdout.splitlines()[-1])
                name = results[contestant]["device"].get("device_name", name)
            else:
                results[contestant] = {"failed": process.stderr.strip().splitlines()[-1:]}
            print(shape, contestant, results[contestant].get("failed", "ok"), file=sys.stderr)
        report["shapes"][shape] = {"results": results, "summary": summary(shape, results)}
    report["device"] = name
    path = RESULTS / f"step-{machine.slug(name)}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
