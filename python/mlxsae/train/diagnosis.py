"""What is wrong with a run, each fault with what to try."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxsae.loss import END_TO_END
from mlxsae.sae import SAE
from mlxsae.sae.copying import copied
from mlxsae.train.config import TrainConfig
from mlxsae.train.engine import make_engine
from mlxsae.train.loop import FitResult, NonFiniteError, Run
from mlxsae.train.state import TrainState

MANY_DEAD = 0.2
OUTLIER = 10.0
"""A row is an outlier where its norm is over so many times the median."""
SLOW = 0.5


@dataclass(frozen=True)
class Finding:
    """One fault: ``nan``, ``zero_l0``, ``many_dead``, ``not_learning``, ``norm_outliers``, ``slow``."""

    name: str
    says: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.says} {self.remedy}"


def diagnose(
    run: FitResult | Run | NonFiniteError | Iterable[dict[str, Any]] | None = None,
    data: Any = None,
    *,
    bare_rate: float | None = None,
) -> list[Finding]:
    """Faults of a run and of its data; empty where there is none.

    Parameters
    ----------
    run : a result, a run in progress, its history, or the error that ended it.
    data : activations ``[n, d]`` to look for outliers in.
    bare_rate : tokens per second of the step alone, see :func:`bare_tokens_per_s`; the run is slow below half of it.
        Measured here, with a handful of steps, for a result of an SAE of ours that was not trained end to end, nor with a
        loss, optimiser or engine of one's own.
    """
    found: list[Finding] = []
    history: list[dict[str, Any]] = []
    failed = isinstance(run, NonFiniteError)
    if isinstance(run, (FitResult, Run)):
        history = run.history
        weights: Any = tree_flatten(run.state.params)
        finite = all(bool(mx.isfinite(w).all()) for _, w in weights)
        failed = not finite or int(np.array(run.state.failed)[0]) >= 0
    elif run is not None and not failed:
        history = list(run) if isinstance(run, Iterable) and not isinstance(run, (str, SAE)) else [None]  # type: ignore[list-item]
        if not all(isinstance(record, Mapping) and "loss" in record for record in history):
            raise ValueError(
                "[diagnose] run must be a result, a run, its history or the error that ended it but got "
                f"{type(run).__name__}."
            )
    if history:
        failed = failed or not all(math.isfinite(r["loss"]) for r in history)
    if failed:
        found.append(
            Finding(
                "nan",
                f"The loss or the activations were not finite{f' (step {run.step})' if isinstance(run, NonFiniteError) else ''}.",
                "Lower the learning rate, warm up longer, clip gradients (max_grad_norm=1.0), keep "
                'normalize="expected_norm", and look for NaN and outliers in the data.',
            )
        )
    if history and not failed:
        found += _of_metrics(history)
    if data is not None:
        found += _of_data(data)
    rates = [r["tokens_per_s"] for r in history[1:] if r.get("tokens_per_s")]
    if rates and not failed:
        if (
            bare_rate is None
            and isinstance(run, FitResult)
            and run.by_config
            and "training" in getattr(run.sae, "metadata", {})
        ):
            config = TrainConfig.from_dict(run.sae.metadata["training"]["config"])
            if config.loss.end_to_end is None:  # such a step is the model's, which is not here
                bare_rate = bare_tokens_per_s(run.sae, config)
        rate = statistics.median(rates)
        if bare_rate is not None and rate < SLOW * bare_rate:
            found.append(
                Finding(
                    "slow",
                    f"Training ran at {rate:,.0f} tokens per second, its step alone makes {bare_rate:,.0f}.",
                    "fit(profile=True) says where the time goes. Data: store activations once (ActivationDataset) or "
                    "read larger batches; callbacks and validation: less often.",
                )
            )
    return found


def _of_metrics(history: list[dict[str, Any]]) -> list[Finding]:
    last, found = history[-1], []
    if last.get("l0", 1.0) == 0:
        found.append(
            Finding(
                "zero_l0",
                "No latent fires.",
                "Lower the learning rate or the weight of the sparsity term, raise k, and check that the data vary.",
            )
        )
    dead = last.get("dead_fraction", 0.0)
    if dead >= MANY_DEAD and last.get("l0", 1.0) > 0:
        found.append(
            Finding(
                "many_dead",
                f"{dead:.0%} of the latents are dead.",
                "Train longer or on more diverse text, lower the expansion factor or the learning rate, keep AuxK on "
                "(auxk), or resample (resample_every).",
            )
        )
    # End to end the reconstruction is only watched: it need not be near the activation.
    watched = not END_TO_END.keys().isdisjoint(last)
    if last.get("fvu", 0.0) >= 1 and len(history) > 1 and not watched:
        found.append(
            Finding(
                "not_learning",
                f"The reconstruction is no better than the mean (FVU {last['fvu']:.2f}).",
                "Change the learning rate, train longer, and check that input and target belong together.",
            )
        )
    return found


def _of_data(data: Any) -> list[Finding]:
    if not hasattr(data, "shape") or len(data.shape) < 2:
        got = f"shape {tuple(data.shape)}" if hasattr(data, "shape") else type(data).__name__
        raise ValueError(
            f"[diagnose] data must be an array [..., d] of activations but got {got}; give x and y one by one."
        )
    if 0 in data.shape:
        raise ValueError(f"[diagnose] data must have at least one row but got shape {tuple(data.shape)}.")
    x = mx.array(data).astype(mx.float32)
    norms = np.array(mx.linalg.norm(x.reshape(-1, x.shape[-1]), axis=-1), np.float64)
    bad = ~np.isfinite(norms)
    found = []
    if bad.any():
        found.append(
            Finding(
                "nan",
                f"{bad.sum():,} of {norms.size:,} rows of the data are not finite.",
                "Run the language model in float32 or bfloat16, and leave these rows out.",
            )
        )
    good = norms[~bad]
    median = float(np.median(good)) if good.size else 0.0
    out = good > OUTLIER * median
    if median > 0 and out.any():
        found.append(
            Finding(
                "norm_outliers",
                f"{out.sum():,} of {norms.size:,} rows have norms over {OUTLIER:.0f} times the median, up to "
                f"{good.max() / median:,.0f} times.",
                "These are attention sinks, as a rule; a few of them rule loss and scale. Leave BOS and special tokens "
                "out (the doors do) and drop the rest (mlxsae.lm.without_outliers, max_norm_ratio of ActivationDataset).",
            )
        )
    return found


def bare_tokens_per_s(sae: SAE, config: TrainConfig, steps: int = 5) -> float:
    """Tokens per second of the training step alone: normal activations at hand, nobody watching, on a copy of ``sae``."""
    working = copied(sae)
    working.set_dtype(mx.float32)
    working.normalize_activations = "none"
    # Without empty branches, as a run keeps them.
    params: Any = tree_unflatten(tree_flatten(working.trainable_parameters()))
    engine = make_engine(config.engine, working, config.loss.build(working, config.total_steps), config)
    state = TrainState(
        params=params,
        optimizer=engine.optimizer_state(params),
        tokens_since_fired=mx.zeros(sae.d_sae, mx.int32),
        failed=mx.array([-1, 0], mx.int32),
        rule=working.rule.initial_state(),
    )
    arrays = state.arrays
    del state, params
    n = config.rows_per_step
    x = mx.random.normal((n, sae.d_in), key=mx.random.key(0))
    y = x if sae.d_out == sae.d_in else mx.random.normal((n, sae.d_out), key=mx.random.key(1))
    mx.eval(x, y, arrays)
    taken = []
    for step in range(steps):
        begin = time.perf_counter()
        arrays, metrics = engine.step(arrays, x, y, lr=1e-4, step=step, auxk=False)
        mx.eval(arrays, metrics)
        taken.append(time.perf_counter() - begin)
    return n / statistics.median(taken[1:] or taken)
