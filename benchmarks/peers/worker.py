"""A contestant in its own process: reads commands, one JSON object a line, and answers each with one.

Own processes keep thread pools, allocators and peak memory apart; the runner lets one work at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.peers.contest import CONTESTANTS
from benchmarks.shapes import SHAPES, batch, weights


class Worker:
    def __init__(self, name: str, shape: str):
        self.peer = CONTESTANTS[name]
        self.shape = SHAPES[shape]
        self.index = 0
        self.contestant: Any = None
        self.rss_before = 0

    def make(self) -> dict:
        """Build the state. What is resident before it is the interpreter and the libraries."""
        self.contestant = None
        if not self.rss_before:
            _load_libraries(self.peer.packages)
            self.rss_before = machine.rss()
        self.contestant = self.peer.make(self.shape, weights(self.shape))
        return {
            "timed": list(self.contestant.timed),
            "versions": machine.versions(*self.peer.packages),
            "can_reset_peak": machine.reset_peak_rss(),
        }

    def run(self, what: str, index: int) -> dict:
        """Time one call on fresh activations."""
        x = self.contestant.batch(batch(self.shape, index))
        result, seconds, waited = _timed(lambda: self.contestant.timed[what](x))
        return {"value": seconds, "waited": waited, "loss": result if isinstance(result, float) else None}

    def phases(self, index: int) -> dict:
        x = self.contestant.batch(batch(self.shape, index))
        phases, _, waited = _timed(lambda: self.contestant.phases(x))
        return {"value": phases, "waited": waited}

    def bandwidth(self) -> dict:
        """GB/s."""
        bandwidth, _, waited = _timed(self.contestant.bandwidth)
        return {"value": bandwidth / 1e9, "waited": waited}

    def reset(self) -> dict:
        return {"can_reset_peak": machine.reset_peak_rss()}

    def memory(self) -> dict:
        """Peak resident bytes of the steps so far: in all, and beyond libraries, parameters, two moments and the batch."""
        known = self.rss_before + 12 * self.shape.n_params + 4 * self.shape.n * self.shape.d_in
        return {"peak": machine.peak_rss(), "extra": machine.peak_rss() - known}

    def digest(self, steps: int) -> dict:
        """Hash of the parameters after ``steps`` steps from a fresh start."""
        self.make()
        for index in range(steps):
            self.contestant.timed["step"](self.contestant.batch(batch(self.shape, index)))
        digest = hashlib.sha256()
        for a in self.contestant.parameters().values():
            digest.update(np.ascontiguousarray(a).tobytes())
        return {"digest": digest.hexdigest()}

    def selection(self) -> dict:
        """Rows in which the selected features are not the k largest, decided in float64.

        A feature may be missing or taken only within the rounding error of a float32 product of this length.
        """
        self.make()
        start, x = weights(self.shape), batch(self.shape, 0)
        chosen = self.contestant.select(self.contestant.batch(x))
        z = (x.astype(np.float64) - start.b_dec) @ start.w_enc.astype(np.float64).T + start.b_enc
        magnitude = np.abs(x - start.b_dec) @ np.abs(start.w_enc).T + np.abs(start.b_enc)
        slack = (self.shape.d_in + 2) * 2.0**-24 * magnitude
        taken = np.zeros(z.shape, bool)
        np.put_along_axis(taken, chosen.astype(np.int64), True, axis=1)
        lowest = np.where(taken, z + slack, np.inf).min(axis=1)
        highest = np.where(taken, -np.inf, z - slack).max(axis=1)
        wrong = (taken.sum(axis=1) != self.shape.k) | (highest > lowest)
        return {"rows": int(wrong.size), "wrong_rows": int(wrong.sum())}


def _timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and what part of them this process' threads waited for a core."""
    delay, start = machine.run_delay(), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return result, seconds, (machine.run_delay() - delay) / seconds


def _load_libraries(packages: tuple[str, ...]) -> None:
    import importlib

    modules = {"mlxsae": "mlxsae.ops", "mlx": "mlx.core", "torch": "torch", "sae-lens": "sae_lens"}
    modules |= {"eai-sparsify": "sparsify", "dictionary-learning": "dictionary_learning"}
    for package in packages:
        if package in modules:
            importlib.import_module(modules[package])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print on import; answers have a pipe of their own
    name, shape, threads = sys.argv[1:]
    if "torch" in CONTESTANTS[name].packages:
        import torch

        torch.set_num_threads(int(threads))
    worker = Worker(name, shape)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
