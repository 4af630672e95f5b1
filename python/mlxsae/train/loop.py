"""``fit``: the one training loop. Every architecture, loss and engine goes through it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxsae.data import ActivationSource, as_source
from mlxsae.loss import Loss
from mlxsae.metrics import Throughput
from mlxsae.sae import SAE
from mlxsae.train import checkpoint
from mlxsae.train.callbacks import Callback, ProgressBar
from mlxsae.train.config import TrainConfig, default_learning_rate
from mlxsae.train.engine import Engine, make_engine
from mlxsae.train.initial import expected_norm_scale, finite_rows, geometric_median
from mlxsae.train.schedules import Schedule, warmup_decay
from mlxsae.train.state import ACTIVATIONS, TrainState, flat, scaled_params

_CHECK_EVERY = 10
"""Steps between two looks at the device (dead latents, failure). Not an option: it is part of what a run
computes.
"""


class NonFiniteError(ArithmeticError):
    """Training met NaN or inf in batch ``step``, counted from 0; the SAE has its weights from before it."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclass
class FitResult:
    """The trained SAE (the one given, its weights folded to raw activations), the last state, the logged
    metrics.
    """

    sae: SAE
    state: TrainState
    history: list[dict[str, Any]]


@dataclass
class Run:
    """A run in progress, as callbacks see it."""

    sae: SAE
    config: TrainConfig
    source: ActivationSource
    engine: Engine
    schedule: Schedule
    state: TrainState
    history: list[dict[str, Any]] = field(default_factory=list)
    checkpoint_dir: Path | None = None

    def export(self) -> SAE:
        """A copy of the SAE with the current weights, for raw activations."""
        sae = copy.deepcopy(self.sae)
        _write_back(sae, self.state)
        return sae

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of this moment into ``checkpoint_dir``."""
        if self.checkpoint_dir is None:
            raise ValueError("[fit] checkpoint_dir must be given to save a checkpoint.")
        self.raise_if_failed()
        host, arrays = self.state.to_files()
        position, held = self.source.state()
        arrays = {f"state.{name}": a for name, a in arrays.items()} | {
            f"source.{name}": a for name, a in held.items()
        }
        host = {"state": host, "source": position, "config": self.config.to_dict(), "history": self.history}
        return checkpoint.save(
            self.checkpoint_dir, self.state.step, host, arrays, keep=self.config.keep_checkpoints
        )

    def restore(self, host: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        """Continue from a checkpoint of an equal run."""
        parts: dict[str, dict[str, mx.array]] = {"state": {}, "source": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = array
        self.state = self.state.from_files(host["state"], parts["state"])
        self.source.restore(host["source"], parts["source"])
        self.history = host["history"]

    def raise_if_failed(self) -> None:
        step, what = (int(n) for n in np.array(self.state.failed))
        if step < 0:
            return
        subject = "activations" if what == ACTIVATIONS else "loss"
        saved = checkpoint.checkpoints(self.checkpoint_dir) if self.checkpoint_dir else []
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        raise NonFiniteError(
            f"[fit] {subject} must be finite but batch {step} (counted from 0) has NaN or inf; "
            f"the SAE keeps its weights from before that batch, {last}.",
            step,
        )


def fit(
    sae: SAE,
    data: ActivationSource | Iterable[mx.array | tuple[mx.array, mx.array]],
    config: TrainConfig | None = None,
    *,
    loss: Loss | None = None,
    schedule: Schedule | None = None,
    engine: Engine | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
) -> FitResult:
    """Train ``sae`` on activations.

    Parameters
    ----------
    sae : trained in place, in float32 whatever its dtype; frozen parameters stay. Its weights change at the
        end (or early end) of the run; until then ``Run.export`` has the current ones.
    data : an :class:`~mlxsae.data.ActivationSource`, or batches ``x [n, d_in]`` or ``(x, y [n, d_out])``.
    config : hyper-parameters.
    loss, schedule, engine : in place of those that ``config`` describes.
    callbacks : see :class:`~mlxsae.train.Callback`.
    checkpoint_dir : where checkpoints go, every ``config.checkpoint_every`` steps, at the end, and on Ctrl-C.
    resume : go on from the newest checkpoint there, if any. The run then equals the uninterrupted one bit for
        bit, given an equal SAE, source and config.
    progress : draw a progress bar on stderr. Nothing else is ever printed.

    Raises
    ------
    NonFiniteError : NaN or inf in activations or loss. Names the batch; no update follows it and no
        checkpoint holds it.
    KeyboardInterrupt : Ctrl-C, after the step in progress and a checkpoint.
    ValueError : shapes, empty data, a checkpoint of another run.
    """
    config = config or TrainConfig()
    source = as_source(data)
    if resume and checkpoint_dir is None:
        raise ValueError("[fit] checkpoint_dir must be given to resume.")
    saved = checkpoint.checkpoints(checkpoint_dir) if resume and checkpoint_dir is not None else []
    if saved:
        host, arrays = checkpoint.load(saved[-1])
        _same_config(host["config"], config.to_dict())
        run = _assemble(sae, source, config, loss, schedule, engine, scale=tuple(host["state"]["scale"]))
        run.restore(host, arrays)
    else:
        run = _start(sae, source, config, loss, schedule, engine)
    run.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
    watchers = [*callbacks, *([ProgressBar()] if progress else [])]
    try:
        with _deferred_interrupt() as interrupted:
            for watcher in watchers:
                watcher.on_begin(run)
            _loop(run, watchers, interrupted)
    except KeyboardInterrupt:
        if run.checkpoint_dir is not None:
            run.save_checkpoint()
        raise
    finally:
        _write_back(sae, run.state)
        for watcher in watchers:
            watcher.on_end(run)
    sae.metadata = sae.metadata | {
        "training": {
            "config": json.loads(json.dumps(config.to_dict())),
            "engine": run.engine.name,
            "steps": run.state.step,
            "tokens": run.state.tokens,
            "activation_scale": list(run.state.scale),
        }
    }
    return FitResult(sae, run.state, run.history)


def _start(
    sae: SAE,
    source: ActivationSource,
    config: TrainConfig,
    loss: Loss | None,
    schedule: Schedule | None,
    engine: Engine | None,
) -> Run:
    """A run before its first step: scale and ``b_dec`` come from a sample of the data."""
    sample = source.sample(config.sample_size)
    _check_batch(sae, sample)
    x, y = _pair(finite_rows(*sample))
    scale = (1.0, 1.0)
    if config.normalize == "expected_norm":
        s_in = expected_norm_scale(x)
        scale = (s_in, s_in if sae.apply_b_dec_to_input else expected_norm_scale(y))
    centre = None
    if config.b_dec_init != "keep":
        centre = (
            geometric_median(y)
            if config.b_dec_init == "geometric_median"
            else y.astype(mx.float32).mean(axis=0)
        )
    return _assemble(sae, source, config, loss, schedule, engine, scale, centre)


def _assemble(
    sae: SAE,
    source: ActivationSource,
    config: TrainConfig,
    loss: Loss | None,
    schedule: Schedule | None,
    engine: Engine | None,
    scale: tuple[float, float],
    b_dec: mx.array | None = None,
) -> Run:
    working = copy.deepcopy(sae)
    working.set_dtype(mx.float32)
    working.update(scaled_params(sae, working.parameters(), *scale))
    params = _tree(working.trainable_parameters())
    if not params:
        raise ValueError("[fit] the SAE must have a parameter to train but all are frozen.")
    if b_dec is not None and "bias" in params.get("decoder", {}):
        params["decoder"]["bias"] = b_dec * scale[1]
    o = config.optimizer
    engine = engine or make_engine(config.engine, working, loss or config.loss.build(working), config)
    state = TrainState(
        params=params,
        optimizer=engine.optimizer_state(params),
        tokens_since_fired=mx.zeros(sae.d_sae, mx.int32),
        failed=mx.array([-1, 0], mx.int32),
        rule=working.rule.initial_state(),
        scale=scale,
    )
    # Only the state holds what is trained: a reference left behind would keep the first weights for the whole run.
    working.update(tree_map(lambda p: mx.broadcast_to(mx.array(0, p.dtype), p.shape), params))
    schedule = schedule or warmup_decay(config.total_steps, warmup=o.warmup, decay=o.decay, shape=o.shape)
    return Run(sae, config, source, engine, schedule, state)


def _loop(run: Run, watchers: list[Callback], interrupted: threading.Event) -> None:
    config, clock = run.config, Throughput()
    finished = run.state.step >= config.total_steps
    saved_at = run.state.step
    while not finished:
        metrics = _advance(run)
        finished = metrics is None or run.state.step >= config.total_steps
        if metrics is not None:
            clock.update(config.batch_size)
            if run.state.step % _CHECK_EVERY == 0:
                _look(run)
            if run.state.step % config.log_every == 0 or finished:
                record = _record(run, metrics, clock)
                for watcher in watchers:
                    watcher.on_log(run, record)
            for watcher in watchers:
                watcher.on_step(run)
        due = finished or run.state.step % config.checkpoint_every == 0
        if due:
            run.raise_if_failed()
            if run.checkpoint_dir is not None and run.state.step > saved_at:
                run.save_checkpoint()
                saved_at = run.state.step
        if interrupted.is_set():
            raise KeyboardInterrupt
    if run.state.step == 0:
        raise ValueError("[fit] there must be at least one batch but got none.")


def _advance(run: Run) -> dict[str, mx.array] | None:
    """One step, launched and not awaited: the host prepares the next batch meanwhile. None at the end of the
    data.
    """
    batch = run.source.next_batch()
    if batch is None:
        return None
    _check_batch(run.sae, batch)
    x, y = _pair(batch)
    state = run.state
    scaled = _scaled(x, state.scale[0])
    target = scaled if y is x else _scaled(y, state.scale[1])
    n = x.shape[0]
    del batch, x, y  # the scaled rows take their place
    base = run.config.optimizer.learning_rate or default_learning_rate(run.sae.d_sae)
    lr = base * run.schedule(state.step)
    arrays, metrics = run.engine.step(
        state.arrays, scaled, target, lr=lr, step=state.step, auxk=state.auxk_active
    )
    run.state = replace(state, **arrays, step=state.step + 1, tokens=state.tokens + n)
    del state  # the last reference to the old arrays: now the update may reuse their memory
    mx.async_eval(arrays, metrics)
    return metrics | {"lr": mx.array(lr)}


def _scaled(a: mx.array, scale: float) -> mx.array:
    a = a.astype(mx.float32)
    return a if scale == 1.0 else a * scale


def _look(run: Run) -> None:
    run.raise_if_failed()
    dead = run.state.tokens_since_fired >= run.config.dead_after
    run.state = replace(run.state, auxk_active=bool(dead.any().item()))


def _record(run: Run, metrics: dict[str, mx.array], clock: Throughput) -> dict[str, Any]:
    record = {"step": run.state.step, "tokens": run.state.tokens}
    record |= {name: value.item() for name, value in metrics.items()}
    run.raise_if_failed()
    record["tokens_per_s"] = clock.tokens_per_s
    clock.restart()
    run.history.append(record)
    return record


def _write_back(sae: SAE, state: TrainState) -> None:
    s_in, s_out = state.scale
    raw = scaled_params(sae, state.params, 1 / s_in, 1 / s_out)
    dtypes = {name: p.dtype for name, p in flat(sae.parameters()).items()}
    sae.update(tree_unflatten([(name, p.astype(dtypes[name])) for name, p in flat(raw).items()]))
    sae.rule.finish(state.rule, s_in)
    mx.eval(sae.parameters())


def _pair(batch: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    return (batch[0], batch[0]) if len(batch) == 1 else (batch[0], batch[1])


def _check_batch(sae: SAE, batch: tuple[mx.array, ...]) -> None:
    x, y = _pair(batch)
    for name, a, width in (("x", x, sae.d_in), ("y", y, sae.d_out)):
        if a.ndim != 2 or a.shape[1] != width or a.shape[0] != x.shape[0]:
            raise ValueError(
                f"[fit] {name} must have shape [n, {width}] with n={x.shape[0]} but got {a.shape}."
            )
        if not mx.issubdtype(a.dtype, mx.floating):
            raise ValueError(f"[fit] {name} must be floating point but got {a.dtype}.")
    if x.shape[0] == 0:
        raise ValueError("[fit] a batch must have at least one row but got none.")


def _same_config(saved: dict[str, Any], mine: dict[str, Any], path: str = "") -> None:
    mine = json.loads(json.dumps(mine))
    for key in sorted(saved.keys() | mine.keys()):
        a, b = saved.get(key), mine.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _same_config(a, b, f"{path}{key}.")
        elif a != b:
            raise ValueError(f"[resume] {path}{key} must be {a!r} as in the checkpoint but got {b!r}.")


def _tree(parameters: dict[str, Any]) -> dict[str, Any]:
    """Without the empty branches that optimisers and files would lose."""
    return tree_unflatten(tree_flatten(parameters))


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of striking in the middle of a step; a second one strikes at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
