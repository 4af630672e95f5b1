"""SIGKILL at any moment: the resumed run ends with the bits of one that nobody touched."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

# One process has everything imported and forks a worker for each run: MLX itself first works in the worker.
NURSERY = textwrap.dedent(
    """
    import hashlib, json, os, sys, time
    import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, numpy as np
    from mlx.utils import tree_flatten
    from mlxsae.data import ShuffleBuffer
    from mlxsae.sae import SAE, BatchTopK, JumpReLU
    from mlxsae.train import Callback, LossConfig, OptimizerConfig, TrainConfig, fit

    D = 16

    class Chunks:
        def __iter__(self):
            for i in range(30):
                rng = np.random.default_rng(i)
                yield (rng.exponential(size=(150, 20)) * (rng.random((150, 20)) < 0.1)
                       @ np.random.default_rng(99).normal(size=(20, D)) + 0.5).astype(np.float32)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            mx.random.seed(5)
            self.encoder, self.drop, self.decoder = nn.Linear(D, 40), nn.Dropout(0.2), nn.Linear(40, D)

        def __call__(self, x):
            z = nn.relu(self.drop(self.encoder(x)))
            return self.decoder(z), z

    class Best(Callback):
        best = 0
        def on_log(self, run, record):
            self.best = max(self.best, record["l0"])
        def state(self):
            return {"best": self.best}
        def restore(self, state):
            self.best = state["best"]

    def arguments(kind):
        base = dict(total_tokens=40 * 64, batch_size=64, sample_size=256, log_every=7, checkpoint_every=3,
                    loss=LossConfig(dead_after=256, k_aux=6))
        noise = lambda x: x + 0.01 * mx.random.normal(x.shape)
        if kind == 0:
            # Nothing but checkpoints: most kills strike while one is written.
            return SAE(D, 48, rule=BatchTopK(4), seed=0), TrainConfig(**base | {"checkpoint_every": 1}), {}
        if kind == 1:
            o = OptimizerConfig(name="muon", learning_rate=1e-2, shape="cosine")
            config = TrainConfig(**base, optimizer=o, normalize="mean_std", gradient_accumulation_steps=2)
            return SAE(D, 48, rule=JumpReLU(4), seed=0), config, {"preprocess": noise}
        optimizer = optim.AdamW(learning_rate=optim.cosine_decay(1e-2, 40), weight_decay=0.1)
        config = TrainConfig(**base, normalize="none", b_dec_init="keep")
        return Own(), config, {"optimizer": optimizer, "preprocess": noise}

    def work(kind, folder):
        sae, config, options = arguments(kind)
        source = ShuffleBuffer(Chunks(), batch_size=64, capacity=600, seed=1)
        print("go", os.getpid(), flush=True)
        best = Best()
        result = fit(sae, source, config, checkpoint_dir=folder, resume=True, callbacks=[best], **options)
        digest = hashlib.sha256()
        for tree in (sae.parameters(), result.state.arrays):
            for name, a in tree_flatten(tree):
                digest.update(name.encode() + np.array(a).tobytes())
        history = [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in result.history]
        digest.update(repr(getattr(getattr(sae, "rule", None), "threshold", None)).encode())
        digest.update(json.dumps([history, best.best, result.state.step]).encode())
        print(digest.hexdigest(), flush=True)

    print("ready", flush=True)
    for line in sys.stdin:
        kind, folder = json.loads(line)
        child = os.fork()
        if not child:
            try:
                work(kind, folder)
            except BaseException as error:
                print("failed", repr(error), flush=True)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        print("over", flush=True)
    """
)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or sys.platform == "win32", reason="needs fork")
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """Three kinds of runs: BatchTopK in the fused engine; JumpReLU by Muon with accumulation, noise and normalisation; a
    module of one's own with dropout under a scheduled optimiser. Parameters, thresholds, moments, counters, history and
    what a callback knows are compared."""
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        answer = nursery.stdout.readline

        def run(kind: int, folder: Path, kill_after: float | None = None) -> tuple[str, float]:
            """The digest, empty where the run was killed, and the seconds from its start to its end."""
            nursery.stdin.write(json.dumps([kind, str(folder)]) + "\n")
            nursery.stdin.flush()
            child = int(answer().removeprefix("go "))
            begin, digest = time.perf_counter(), ""
            if kill_after is not None:
                time.sleep(kill_after)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            while (line := answer()) != "over\n":
                digest = line.strip()
            return digest, time.perf_counter() - begin

        assert answer() == "ready\n"
        whole = [run(kind, tmp_path / f"whole{kind}") for kind in range(3)]
        assert len({digest for digest, _ in whole}) == 3
        assert all(len(digest) == 64 for digest, _ in whole), whole
        moments, killed, saved, same = random.Random(0), 0, [], []
        lasts = [seconds for _, seconds in whole]
        for trial in range(20):
            kind = trial % 3
            expected, folder = whole[kind][0], tmp_path / str(trial)
            # The first three strike early, before there is a checkpoint.
            digest, seconds = run(kind, folder, moments.random() * lasts[kind] * (0.05 if trial < 3 else 1))
            if digest:  # done sooner than measured, as where others were busy then
                lasts[kind] = min(lasts[kind], seconds)
            killed += not digest
            saved.append(any(folder.glob("step_*")))
            same.append(run(kind, folder)[0] == expected)
        nursery.stdin.close()
    assert same == [True] * 20
    assert killed >= 10
    assert {True, False} == set(saved)  # before the first checkpoint, and after it
    assert not list(tmp_path.rglob(".step_*"))  # what was half written is cleared away
