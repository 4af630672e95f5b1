"""The time of one training step, by the trainer that users call."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import mlx.core as mx

from mlxsae.sae import RULES, of_rule
from mlxsae.train import Callback, LossConfig, Run, TrainConfig, fit

_LOOK = 10
"""The trainer looks for dead latents every so many steps; AuxK acts from then on."""


class _Clock(Callback):
    """Waits for the work of each step and notes when it was done."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.dead = 0.0

    def on_begin(self, run: Run) -> None:
        mx.eval(run.state.arrays)
        self.times.append(time.perf_counter())

    def on_step(self, run: Run) -> None:
        mx.eval(run.state.arrays)
        self.times.append(time.perf_counter())

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        self.dead = record["dead_fraction"]


def time_step(
    *,
    n: int,
    d_in: int,
    d_sae: int,
    k: int,
    rule: str = "topk",
    precision: str = "float32",
    aux: bool = False,
    steps: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Time steps of :func:`mlxsae.train.fit`: forward, backward, Adam, decoder renorm, dead-latent bookkeeping.

    Every step has a fresh batch ``[n, d_in]`` of standard normal activations, made beforehand. Steps before the timed
    ones warm up, until AuxK acts if it is asked for; with ``aux`` a latent is dead as soon as one batch leaves it
    silent, the most work that AuxK can make.

    Returns
    -------
    dict
        ``median_s`` and ``min_s`` (seconds a step), ``tokens_per_s`` (``n / median_s``), ``peak_rss_bytes`` (of this
        process, all included), ``dead_fraction`` at the end, ``engine``, and ``steps``.
    """
    if rule not in RULES:
        raise ValueError(f"[time_step] rule must be one of {', '.join(sorted(RULES))} but got {rule!r}.")
    if steps < 1:
        raise ValueError(f"[time_step] steps must be positive but got {steps}.")
    warm_up = _LOOK + 1 if aux else 3
    total = warm_up + steps
    keys = mx.random.split(mx.random.key(seed), total)
    batches = [mx.random.normal((n, d_in), key=key) for key in keys]
    mx.eval(batches)
    chosen = RULES[rule](**({"k": k} if "k" in RULES[rule].PARAMETERS else {}))
    sae = of_rule(d_in, d_sae, rule=chosen, seed=seed)
    clock = _Clock()
    result = fit(
        sae,
        batches,
        TrainConfig(
            total_tokens=total * n,
            batch_size=n,
            seed=seed,
            precision=precision,
            normalize="none",
            sample_size=n,
            log_every=total,
            loss=LossConfig(auxk=LossConfig.auxk if aux else None, dead_after=1 if aux else 2**30),
        ),
        callbacks=[clock],
    )
    taken = [b - a for a, b in zip(clock.times[:-1], clock.times[1:], strict=True)][warm_up:]
    median = statistics.median(taken)
    return {
        "median_s": median,
        "min_s": min(taken),
        "tokens_per_s": n / median,
        "peak_rss_bytes": peak_rss_bytes(),
        "dead_fraction": clock.dead,
        "engine": result.sae.metadata["training"]["engine"],
        "steps": len(taken),
    }


def peak_rss_bytes() -> int:
    """The largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
