"""What the trainer costs over its step alone: data, logging, tracking, callbacks, checks.

``python -m benchmarks.trainer_overhead --shape S1`` runs ``fit`` with all of these and, in turns of the same process, the
same engine's step on batches at hand. Writes the ratio of their times, turn by turn, to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import machine
from benchmarks.shapes import SHAPES, batch, weights
from benchmarks.steps import TrainerStep
from mlxsae import SAE, ops
from mlxsae.data import ArraySource
from mlxsae.train import Callback, EarlyStoppingCallback, LossConfig, Run, TrainConfig, fit
from mlxsae.train.tracking import LocalTracker, TrackingCallback

RESULTS = Path(__file__).parent / "results"
BLOCK = 10
BATCHES = 24


class Turns(Callback):
    """After each block of the run's steps, a block of bare ones."""

    def __init__(self, bare: TrainerStep, batches: list[mx.array]):
        self._bare, self._batches = bare, itertools.cycle(batches)
        self.run: list[float] = []
        self.bare: list[float] = []

    def on_begin(self, run: Run) -> None:
        mx.eval(run.state.arrays)
        self._begin = time.perf_counter()

    def on_step(self, run: Run) -> None:
        if run.state.step % BLOCK:
            return
        mx.eval(run.state.arrays, run.metrics)
        middle = time.perf_counter()
        for _ in range(BLOCK):
            self._bare.step(next(self._batches))
        end = time.perf_counter()
        self.run.append((middle - self._begin) / BLOCK)
        self.bare.append((end - middle) / BLOCK)
        self._begin = time.perf_counter()


class Plain:
    """A callback of somebody else's."""

    def on_batch_end(self, step: int, loss: Any, metrics: dict) -> None:
        self.seen = step


def measure(name: str, blocks: int) -> dict[str, Any]:
    shape = SHAPES[name]
    start = weights(shape)
    rows = np.concatenate([batch(shape, i) for i in range(BATCHES)])
    ready = [mx.array(rows[i * shape.n : (i + 1) * shape.n]) for i in range(BATCHES)]
    mx.eval(ready)
    turns = Turns(TrainerStep(shape, start), ready)
    w_enc, b_enc, w_dec, b_dec = (mx.array(a) for a in start)
    sae = SAE.from_weights(w_enc.T, w_dec, b_enc, b_dec, k=shape.k)
    config = TrainConfig(
        total_tokens=shape.n * BLOCK * (blocks + 1),
        batch_size=shape.n,
        log_every=BLOCK,
        loss=LossConfig(reconstruction="mse", auxk=None),
    )
    with tempfile.TemporaryDirectory() as folder:
        watchers = [
            TrackingCallback(LocalTracker(folder)),
            EarlyStoppingCallback(patience=1000, metric="loss"),
            Plain(),
            turns,
        ]
        fit(sae, ArraySource(rows, batch_size=shape.n), config, callbacks=watchers)
    run, bare = turns.run[1:], turns.bare[1:]  # the first block warms up
    ratios = [a / b for a, b in zip(run, bare, strict=True)]
    return {
        "shape": shape._asdict(),
        "run_s": run,
        "bare_s": bare,
        "overhead": statistics.median(ratios) - 1,
        "machine": machine.describe(ops.num_threads()),
        "versions": machine.versions("mlxsae", "mlx", "numpy", "scipy-openblas32"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S1", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int, default=15, help=f"of {BLOCK} steps each")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"trainer-cpu-{machine.slug(machine.cpu_name())}.json"
    )
    options = parser.parse_args()
    found = measure(options.shape, options.blocks)
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(kept | {options.shape: found}, indent=1) + "\n")
    print(
        f"{options.shape}: a step of fit {statistics.median(found['run_s']) * 1e3:.1f} ms, "
        f"the step alone {statistics.median(found['bare_s']) * 1e3:.1f} ms, overhead {found['overhead']:.1%}"
    )


if __name__ == "__main__":
    main()
