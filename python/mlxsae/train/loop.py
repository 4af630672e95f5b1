"""``fit``: the one training loop. Every architecture, loss and engine goes through it, one SAE or many."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxsae.data import ActivationSource, as_source
from mlxsae.data.source import rows_in
from mlxsae.loss import Context, Forward, Loss
from mlxsae.metrics import Throughput, fire_counts, l0
from mlxsae.sae import SAE
from mlxsae.sae.copying import copied
from mlxsae.sae.model import layer_norm
from mlxsae.train import checkpoint
from mlxsae.train.callbacks import Callback, ProgressBar, as_callback, listed
from mlxsae.train.config import WAKE, TrainConfig, default_learning_rate
from mlxsae.train.engine import AutodiffEngine, Engine, FusedEngine, make_engine, substituted
from mlxsae.train.initial import (
    Spread,
    begin,
    column_statistics,
    expected_norm_scale,
    finite_rows,
    frozen,
    geometric_median,
    initialize,
    source_statistics,
    spread,
    untrained,
    waits_for_data,
)
from mlxsae.train.module_engine import LossFunction, ModuleEngine, forward
from mlxsae.train.optimizers import split_schedule
from mlxsae.train.pressure import SparsityController
from mlxsae.train.randomness import kept_random_state, seed_step
from mlxsae.train.resampling import DeadNeuronCallback
from mlxsae.train.schedules import Schedule, in_steps, warmup_decay
from mlxsae.train.state import (
    ACTIVATIONS,
    GRADIENT,
    TrainState,
    flat,
    folded,
    inverted,
    normalized,
    scaled_params,
    unnormalized,
)

_CHECK_EVERY = 10
"""Steps between two looks at the device (dead latents, failure). Not an option: it is part of what a run
computes.
"""

_START_ROWS = 256  # tokens on which a rule starts: their dense pre-activations are held at once

Validation = Any
"""An array ``[n, d]``, a pair of them, or batches that can be walked again."""


class NonFiniteError(ArithmeticError):
    """Training met NaN or inf in batch ``step``, counted from 0; the SAE has its weights from before it."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclass
class FitResult:
    """What a run left.

    Attributes
    ----------
    sae : the one given, its weights folded to raw activations.
    state : the last state.
    history : metrics, a record each ``log_every`` steps and of the last: ``step``, ``tokens``, ``loss``, each term, ``l0``,
        ``dead_fraction``, ``lr``, ``tokens_per_s``.
    validations : a record each ``validate_every`` steps: ``step``, ``val_loss``, each term as ``val_...``, ``val_l0``,
        ``val_dead_fraction``.
    stopped : why the run ended before its plan, the end of the data included; empty if it did not.
    profile : with ``profile=True``, seconds spent by part (``data``, ``step``, ``log``, ``callbacks``,
        ``validation``, ``checkpoint``), ``steps``, ``tokens_per_s`` and ``peak_bytes`` of MLX's memory.
    by_config : whether the configuration says all about the step: no loss, optimiser or engine of one's own.
    """

    sae: Any
    state: TrainState
    history: list[dict[str, Any]]
    validations: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    profile: dict[str, float] | None = None
    by_config: bool = True

    def __iter__(self) -> Iterator[Any]:
        """``sae, result = train_sae_from_activations(...)``."""
        return iter((self.sae, self))


@dataclass(frozen=True)
class Job:
    """One SAE of :func:`fit_many`, with what :func:`fit` takes for it.

    ``fields`` says which arrays of a batch are its ``x`` and ``y``: ``(0,)`` an SAE on the first, ``(0, 2)`` a
    transcoder from the first to the third. By default a batch is ``(x,)`` or ``(x, y)``. ``name`` tells it from
    others; by default its number.
    """

    sae: Any
    config: TrainConfig | None = None
    fields: tuple[int, ...] | None = None
    loss: Loss | LossFunction | None = None
    optimizer: optim.Optimizer | None = None
    schedule: Schedule | None = None
    engine: Engine | None = None
    callbacks: Iterable[Any] = ()
    name: str = ""


class Widths:
    """What an SAE asks of a batch and of the state; a module of one's own says it by a trial run."""

    def __init__(self, module: Any, sample: mx.array):
        self.ours = isinstance(module, SAE)
        if self.ours:
            self.x, self.y, self.d_sae = module.d_in, module.d_out, module.d_sae
        else:
            x_recon, z, _ = forward(module, sample[:1].astype(mx.float32))  # lazy: nothing is computed
            self.x, self.y, self.d_sae = sample.shape[-1], x_recon.shape[-1], z.shape[-1]


@dataclass
class Run:
    """A run in progress, as callbacks see it."""

    sae: Any
    config: TrainConfig
    source: ActivationSource
    engine: Engine
    learning_rate: Callable[[int], float]
    state: TrainState
    widths: Widths
    loss: Loss | None = None
    module: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    checkpoint_dir: Path | None = None
    name: str = ""
    fields: tuple[int, ...] | None = None
    stopped: str = ""
    finished: bool = False
    validated: bool = False
    metrics: dict[str, mx.array] = field(default_factory=dict)
    watchers: list[Callback] = field(default_factory=list)
    _save: Callable[[], Path] | None = None
    _sample: Callable[[Run, int], tuple[mx.array, mx.array]] | None = None

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far; None where the data do not know their length."""
        rows = source_rows(self.source)
        return None if rows is None else self.state.tokens / rows

    def settle(self) -> None:
        """Let the decoder's rows make the steps that they have missed under lazy Adam, before one reads
        ``state.params`` or ``state.optimizer``. What a run calls to read them does it: validation, checkpoints,
        :meth:`export`, :meth:`write_back`, :meth:`current`, the result."""
        if self.state.lazy is None:
            return
        self.state = replace(self.state, **FusedEngine.settled(self.state.arrays), lazy=None)

    def export(self) -> Any:
        """A copy of the SAE with the current weights, for raw activations."""
        sae = copied(self.sae)
        self.write_back(sae)
        return sae

    def write_back(self, sae: Any) -> None:
        """Give ``sae`` the current weights, for raw activations."""
        self.settle()
        state, raw = self.state, self.state.params
        if isinstance(sae, SAE):
            s_in, s_out = state.scale
            raw = unnormalized(sae, scaled_params(sae, raw, 1 / s_in, 1 / s_out), state.norm)
        dtypes = {name: p.dtype for name, p in flat(sae.parameters()).items()}
        sae.update(tree_unflatten([(name, p.astype(dtypes[name])) for name, p in flat(raw).items()]))
        if isinstance(sae, SAE):
            # A threshold of what latents write is measured like the target.
            sae.rule.finish(state.rule, state.scale[1 if sae.rank_by_decoder_norm else 0])
            if self.config.normalize == "layer_norm":
                sae.normalize_activations = "layer_norm"
        mx.eval(sae.parameters())

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """The SAE with the weights of this moment, in the scaled space of the run, for the length of a block."""
        self.settle()
        return substituted(self.module, self.state.params)

    def sample(self, n: int) -> tuple[mx.array, mx.array]:
        """Up to ``n`` rows of the data as the SAE sees them, ``(x, y)``, none at the end of a stream; the batches to come are
        not disturbed."""
        assert self._sample is not None
        return self._sample(self, n)

    def stop(self, reason: str) -> None:
        """End the run in order after this step."""
        self.stopped = reason

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of this moment into ``checkpoint_dir``."""
        if self._save is None:
            raise ValueError("[fit] checkpoint_dir must be given to save a checkpoint.")
        return self._save()

    def to_files(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """The run as a JSON-able part and named arrays."""
        self.raise_if_failed()
        self.settle()
        host, arrays = self.state.to_files()
        return {
            "name": self.name,
            "state": host,
            "config": self.config.to_dict(),
            "history": self.history,
            "validations": self.validations,
            "stopped": self.stopped,
            "callbacks": {name: watcher.state() for name, watcher in _named(self.watchers)},
        }, arrays

    def from_files(self, host: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        """Continue from what an equal run gave."""
        self.state = self.state.from_files(host["state"], arrays)
        self.history, self.validations = host["history"], host["validations"]
        self.stopped = host["stopped"]
        for name, watcher in _named(self.watchers):
            if host["callbacks"].get(name):
                watcher.restore(host["callbacks"][name])

    def raise_if_failed(self) -> None:
        step, what = (int(n) for n in np.array(self.state.failed))
        if step < 0:
            return
        subject = {ACTIVATIONS: "activations", GRADIENT: "the gradient of the loss"}.get(what, "loss")
        saved = checkpoint.checkpoints(self.checkpoint_dir) if self.checkpoint_dir else []
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        of = f" of {self.name}" if self.name else ""
        raise NonFiniteError(
            f"[fit] {subject}{of} must be finite but batch {step} (counted from 0) has NaN or inf; "
            f"the SAE keeps its weights from before that batch, {last}.",
            step,
        )


def fit(
    sae: Any,
    data: ActivationSource | Iterable[mx.array | tuple[mx.array, mx.array]],
    config: TrainConfig | None = None,
    *,
    loss: Loss | LossFunction | None = None,
    optimizer: optim.Optimizer | None = None,
    schedule: Schedule | None = None,
    engine: Engine | None = None,
    preprocess: Callable[[mx.array], mx.array] | None = None,
    validation: Validation | None = None,
    callbacks: Iterable[Any] = (),
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    profile: bool = False,
) -> FitResult:
    """Train ``sae`` on activations.

    Parameters
    ----------
    sae : trained in place, in float32 whatever its dtype; frozen parameters stay. Its weights change at the
        end (or early end) of the run; until then ``Run.export`` has the current ones. Any ``nn.Module`` that returns
        ``(x_recon, z)`` will do, with ``normalize="none"`` and ``b_dec_init="keep"``.
    data : an :class:`~mlxsae.data.ActivationSource`, or batches ``x [n, d_in]`` or ``(x, y [n, d_out])``.
    config : hyper-parameters.
    loss : a :class:`~mlxsae.loss.Loss` in place of the one ``config`` describes, or a function
        ``(x, x_recon, z, step) -> (total, {name: value})``, see :mod:`mlxsae.train.module_engine`.
    optimizer : any MLX optimiser in place of the one ``config`` describes, with its own learning rate or schedule.
    schedule : function from the step to a factor on the learning rate, in place of ``config``'s.
    engine : in place of the one ``config`` names.
    preprocess : applied to the input of every batch, to the sample that initialises and to ``validation``. Its
        randomness should be ``mx.random``'s, which is a function of seed and step here.
    validation : held-out activations, measured every ``config.validate_every`` steps and at the end.
    callbacks : see :class:`~mlxsae.train.Callback`; plain classes with ``on_batch_end`` and the like work.
    checkpoint_dir : where checkpoints go, every ``config.checkpoint_every`` steps, at the end, and on Ctrl-C.
    resume : go on from the newest checkpoint there, if any. The run then equals the uninterrupted one bit for
        bit, given an equal SAE, source and config.
    progress : draw a progress bar on stderr. Nothing else is ever printed.
    profile : wait for each step and account for the time in the result's ``profile``.

    Raises
    ------
    NonFiniteError : NaN or inf in activations or loss. Names the batch; no update follows it and no
        checkpoint holds it.
    KeyboardInterrupt : Ctrl-C, after the step in progress and a checkpoint.
    ValueError : shapes, empty data, a checkpoint of another run.
    """
    job = Job(sae, config, None, loss, optimizer, schedule, engine, callbacks)
    return fit_many(
        [job],
        data,
        preprocess=preprocess,
        validation=validation,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        progress=progress,
        profile=profile,
    )[0]


def fit_many(
    jobs: Sequence[Job],
    data: ActivationSource | Iterable[mx.array | tuple[mx.array, ...]],
    *,
    preprocess: Callable[[mx.array], mx.array] | None = None,
    validation: Validation | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    profile: bool = False,
) -> list[FitResult]:
    """:func:`fit` for several SAEs on one stream of activations: a sweep over k, width, seed or learning rate, or
    several layers of one forward pass.

    A batch is read, moved and scaled once for all; so is the sample that initialises, with its geometric median. Each
    SAE gets the bits that it would get alone. A run that is done early waits no more. One checkpoint holds them all.

    Jobs must agree in ``batch_size``, ``gradient_accumulation_steps``, ``checkpoint_every`` and ``sample_size``.
    """
    if not jobs:
        raise ValueError("[fit] there must be at least one job but got none.")
    if other := next((job for job in jobs if not isinstance(job, Job)), None):
        raise ValueError(f"[fit_many] jobs must be of Job but got {type(other).__name__}.")
    if resume and checkpoint_dir is None:
        raise ValueError("[fit] checkpoint_dir must be given to resume.")
    source = as_source(data)
    with kept_random_state():
        session = _Session(jobs, source, preprocess, validation, checkpoint_dir, profile)
        session.begin(resume)
        if progress:
            session.runs[0].watchers.append(ProgressBar())
        session.train()
    return [session.result(run) for run in session.runs]


class _Session:
    """Runs that share a stream."""

    def __init__(
        self,
        jobs: Sequence[Job],
        source: ActivationSource,
        preprocess: Callable[[mx.array], mx.array] | None,
        validation: Validation | None,
        directory: str | os.PathLike | None,
        profile: bool,
    ):
        self.source = source
        self.jobs = [_settled(job, i if len(jobs) > 1 else None, source) for i, job in enumerate(jobs)]
        self.preprocess = preprocess
        self.validation = validation
        self.directory = None if directory is None else Path(directory)
        self.clock = _Clock() if profile else None
        self.runs: list[Run] = []
        self._saved_at = -1
        first = self.jobs[0].config
        assert first is not None
        for job in self.jobs[1:]:
            for name in ("batch_size", "gradient_accumulation_steps", "checkpoint_every", "sample_size"):
                a, b = getattr(first, name), getattr(job.config, name)
                if a != b:
                    raise ValueError(f"[fit_many] {name} must be the same in all jobs but got {a} and {b}.")
        names = [job.name for job in self.jobs]
        if len(set(names)) < len(names):
            raise ValueError(f"[fit_many] names must differ but got {names}.")
        self.config: TrainConfig = first
        given = [c for job in self.jobs for c in job.callbacks if isinstance(c, Callback)]
        for c in given:
            if type(c).of is not Callback.of and sum(c is other for other in given) > 1:
                raise ValueError(
                    f"[fit_many] {type(c).__name__} must watch one job but is given to several; give each its own."
                )

    # ---- beginning -----------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        saved = checkpoint.checkpoints(self.directory) if resume and self.directory is not None else []
        if not saved:
            seed_step(self.config.seed, 0, stream=1)
            start = _Start(self._prepared(self.source.sample(self.config.sample_size)))
            self.runs = [self._run(job, start) for job in self.jobs]
            return
        host, arrays = checkpoint.load(saved[-1])
        if len(host["runs"]) != len(self.jobs):
            raise ValueError(
                f"[resume] there must be {len(host['runs'])} jobs as in the checkpoint but got {len(self.jobs)}."
            )
        parts: dict[str, dict[str, mx.array]] = {}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = array
        start = _Start(self.source.sample(1))
        for i, (job, own) in enumerate(zip(self.jobs, host["runs"], strict=True)):
            assert job.config is not None
            _same_config(own["config"], job.config.to_dict())
            run = self._run(job, start, own["state"])
            run.from_files(own, parts.get(_part(i), {}))
            run.finished = bool(run.stopped) or run.state.step >= run.config.total_steps
            self.runs.append(run)
        self.source.restore(host["source"], parts.get("source", {}))
        self._saved_at = self._step

    def _run(self, job: Job, start: _Start, saved: dict[str, Any] | None = None) -> Run:
        run = _assemble(job, self.source, start, saved)
        run.checkpoint_dir = self.directory
        run.validated = self.validation is not None
        run._save = None if self.directory is None else self.save
        run._sample = self._sampled
        run.watchers += [as_callback(c) for c in job.callbacks]
        if run.config.resample_every is not None:
            run.watchers.insert(0, DeadNeuronCallback(resample_every=run.config.resample_every))
        return run

    def _sampled(self, run: Run, n: int) -> tuple[mx.array, mx.array]:
        rows = self.source.sample(n)
        seed_step(run.config.seed, run.state.step, stream=5)  # whatever other runs have drawn
        return _Batch(self._prepared(rows) if rows[0].shape[0] else rows).pair(run)

    # ---- training ------------------------------------------------------------------------------------------

    def train(self) -> None:
        clocks = {id(run): Throughput() for run in self.runs}
        if self.directory is not None:  # what cannot be written is found now
            self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with _deferred_interrupt() as interrupted:
                for run in self.runs:
                    for watcher in run.watchers:
                        watcher.on_begin(run)
                self._loop(clocks, interrupted)
        except KeyboardInterrupt:
            if self.directory is not None and self._step > self._saved_at:
                self.save()
            raise
        finally:
            with contextlib.ExitStack() as ending:  # each is told, whatever another raises
                for run in reversed(self.runs):
                    for watcher in reversed(run.watchers):
                        ending.callback(watcher.on_end, run)
                for run in self.runs:
                    run.write_back(run.sae)

    def _loop(self, clocks: dict[int, Throughput], interrupted: threading.Event) -> None:
        while active := [run for run in self.runs if not run.finished]:
            with self._timed("data"):
                batch = self._next_batch()
            # All take their step before anybody watches: whatever a callback raises, the runs stand alike.
            before = {id(run): run.state.tokens for run in active}
            if batch is not None:
                with self._timed("step"):
                    for run in active:
                        seed_step(run.config.seed, run.state.step)
                        _advance(run, batch)
                    if self.clock is not None:
                        mx.eval([(run.state.arrays, run.metrics) for run in active])
            over, pending = batch is None, None
            del batch
            for run in active:
                try:
                    self._watch(run, before[id(run)], over, clocks[id(run)])
                except KeyboardInterrupt as interrupt:
                    pending = interrupt
            step = self._step
            if all(run.finished for run in self.runs) or step % self.config.checkpoint_every == 0:
                for run in active:
                    run.raise_if_failed()
                # What the end of the data adds to a step that is saved already is saved too.
                if self.directory is not None and (step > self._saved_at or (over and step)):
                    with self._timed("checkpoint"):
                        self.save()
            if pending or interrupted.is_set():
                raise pending or KeyboardInterrupt
        if self._step == 0:
            raise ValueError("[fit] there must be at least one batch but got none.")

    def _watch(self, run: Run, before: int, over: bool, clock: Throughput) -> None:
        """What follows a step of a run, which had ``before`` tokens; ``over`` if there were no data for it."""
        config, rows = run.config, source_rows(self.source)
        if over:
            run.finished = True
            run.stopped = f"the data ended after {run.state.step} of {config.total_steps} steps"
            self._concluded(run, clock)
            if rows is None and run.state.step:
                _tell(run, "on_epoch", 1)
            return
        step = run.state.step
        clock.update(run.state.tokens - before)
        run.finished = step >= config.total_steps
        with self._timed("log"):
            if step % _CHECK_EVERY == 0:
                _look(run)
            record = None
            if step % config.log_every == 0 or run.finished:
                record = _record(run, clock)
        if self.validation is not None and (step % config.validate_every == 0 or run.finished):
            self._validated(run)
        with self._timed("callbacks"):
            if record is not None:
                _tell(run, "on_log", record)
            _tell(run, "on_step")
            for epoch in range(before // rows + 1, run.state.tokens // rows + 1) if rows else ():
                _tell(run, "on_epoch", epoch)
        if run.finished:  # it has come to the end of its plan, whatever a callback wanted
            run.stopped = ""
        elif run.stopped:
            run.finished = True
            self._concluded(run, clock)

    def _concluded(self, run: Run, clock: Throughput) -> None:
        """The last record and validation of a run that ends before its plan."""
        if run.metrics and (not run.history or run.history[-1]["step"] != run.state.step):
            _tell(run, "on_log", _record(run, clock))
        if run.state.step and self.validation is not None:
            self._validated(run)

    def _validated(self, run: Run) -> None:
        if run.validations and run.validations[-1]["step"] == run.state.step:
            return
        with self._timed("validation"):
            found = self._validate(run)
            run.validations.append(found)
        _tell(run, "on_validation", found)

    @property
    def _step(self) -> int:
        return max(run.state.step for run in self.runs)

    def _next_batch(self) -> _Batch | None:
        parts = []
        for _ in range(self.config.gradient_accumulation_steps):
            part = self.source.next_batch()
            if part is None:
                break
            if len(_activations(part)) < len(part) and self.config.gradient_accumulation_steps > 1:
                raise ValueError("[fit] gradient_accumulation_steps must be 1 for whole contexts.")
            parts.append(part)
        if not parts:
            return None
        whole = (
            parts[0] if len(parts) == 1 else tuple(mx.concatenate(list(f)) for f in zip(*parts, strict=True))
        )
        for run in self.runs:
            _check_batch(run, whole)
        # The step's own numbers are drawn in _loop; what is done to the batch is the same for all runs.
        seed_step(self.config.seed, self._step, stream=2)
        return _Batch(self._prepared(whole))

    def _prepared(self, batch: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        if self.preprocess is None:
            return batch
        inputs = {(job.fields or (0,))[0] for job in self.jobs}
        made = tuple(self.preprocess(a) if i in inputs else a for i, a in enumerate(batch))
        for a, given in zip(made, batch, strict=True):
            fits = isinstance(a, mx.array) and a.ndim == given.ndim and a.shape[0] > 0
            if not fits or (len(batch) > 1 and a.shape[0] != given.shape[0]):  # rows alone may be left out
                got = getattr(a, "shape", type(a).__name__)
                raise ValueError(
                    f"[fit] preprocess must return an array [{given.shape[0]}, d] but returned {got}."
                )
        return made

    # ---- measuring, saving, ending -------------------------------------------------------------------------

    def _validate(self, run: Run) -> dict[str, Any]:
        sums: dict[str, float] = {}
        fired, n = np.zeros(run.widths.d_sae, np.int64), 0
        seed_step(run.config.seed, 0, stream=3)
        for batch in _walk(self.validation, run.config.batch_size):
            _check_batch(run, batch)
            held = _Batch(self._prepared(batch))
            metrics, counts = _evaluate(run, *held.pair(run), held.context(run))
            mx.eval(metrics, counts)
            rows = held.arrays[0].shape[0]  # preprocessing may leave some out
            fired += np.array(counts, np.int64)
            n += rows
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + rows * float(value)
        if n == 0:
            raise ValueError("[fit] validation must have at least one row but got none.")
        found: dict[str, Any] = {"step": run.state.step, "tokens": run.state.tokens}
        found |= {f"val_{name}": value / n for name, value in sums.items()}
        return found | {"val_dead_fraction": float((fired == 0).mean())}

    def save(self) -> Path:
        assert self.directory is not None
        position, held = self.source.state()
        arrays = {f"source.{name}": a for name, a in held.items()}
        runs = []
        for i, run in enumerate(self.runs):
            host, own = run.to_files()
            runs.append(host)
            arrays |= {f"{_part(i)}.{name}": a for name, a in own.items()}
        host = {"runs": runs, "source": position}
        path = checkpoint.save(self.directory, self._step, host, arrays, keep=self.config.keep_checkpoints)
        self._saved_at = self._step
        return path

    def _timed(self, part: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.clock is None else self.clock.part(part)

    def result(self, run: Run) -> FitResult:
        if run.widths.ours:
            run.sae.metadata = run.sae.metadata | {
                "training": {
                    "config": json.loads(json.dumps(run.config.to_dict())),
                    "engine": run.engine.name,
                    "steps": run.state.step,
                    "tokens": run.state.tokens,
                    "activation_scale": list(run.state.scale),
                }
            }
        profile = None if self.clock is None else self.clock.result(run)
        job = next(job for job, other in zip(self.jobs, self.runs, strict=True) if other is run)
        own = [given for given in (job.loss, job.optimizer, job.engine) if given is not None]
        run.settle()
        return FitResult(run.sae, run.state, run.history, run.validations, run.stopped, profile, not own)


class _Start:
    """What the first sample decides, computed once for all runs that ask the same."""

    def __init__(self, sample: tuple[mx.array, ...]):
        self.sample = sample
        self._finite: dict[tuple[int, ...], tuple[mx.array, ...]] = {}
        self._found: dict[Any, Any] = {}

    def rows(self, fields: tuple[int, ...]) -> tuple[mx.array, ...]:
        if fields not in self._finite:
            self._finite[fields] = finite_rows(*(self.sample[i] for i in fields))
        return self._finite[fields]

    def of(
        self, what: Callable[[mx.array], Any], fields: tuple[int, ...], which: int, by_token: bool = False
    ) -> Any:
        """``what`` says of the rows of one field, or of their :func:`layer_norm`."""
        key = what, fields, which, by_token
        if key not in self._found:
            rows = self.rows(fields)[which]
            self._found[key] = what(layer_norm(rows)[0] if by_token else rows)
        return self._found[key]


class _Batch:
    """A batch, and what runs made of it that others may use."""

    def __init__(self, arrays: tuple[mx.array, ...]):
        self.arrays = _activations(arrays)
        self._context = arrays[len(self.arrays) :]
        self._made: dict[Any, mx.array] = {}

    def pair(self, run: Run) -> tuple[mx.array, mx.array]:
        """``(x, y)`` in the run's scaled space; one array where the target is the input."""
        i, j = _places(run.fields, len(self.arrays))
        state = run.state
        by_token = run.config.normalize == "layer_norm"
        x = self.scaled(i, state.norm, state.scale[0], 0, by_token)
        return x, x if i == j else self.scaled(j, state.norm, state.scale[1], 1)

    def context(self, run: Run) -> Context | None:
        """What a loss of this run may ask a language model about; None of rows that are no contexts."""
        if not self._context or run.loss is None or not isinstance(run.engine, AutodiffEngine):
            return None
        if "whiten_in" in run.state.norm:  # no scale of coordinates undoes it
            return None
        norm, std, mean = run.state.norm, mx.array(1.0), mx.array(0.0)
        if norm:
            which = "out" if "mean_out" in norm else "in"
            std, mean = norm[f"std_{which}"], norm[f"mean_{which}"]
        elif run.config.normalize == "layer_norm":
            _, mean, std = layer_norm(self.arrays[_places(run.fields, len(self.arrays))[1]])
        tokens, places = self._context
        return Context(tokens, places, std / run.state.scale[1], mean)

    def scaled(
        self, i: int, norm: dict[str, mx.array], scale: float, side: int, by_token: bool = False
    ) -> mx.array:
        # Runs that start from one sample hold the very same statistics.
        held = tuple(id(norm[name]) for name in ("mean_in", "whiten_in") if name in norm)
        key = i, scale, held, side if norm else 0, by_token
        if key not in self._made:
            a = self.arrays[i].astype(mx.float32)
            if by_token:
                a = layer_norm(a)[0]
            if norm:
                a = normalized(a, norm, "out" if side and "mean_out" in norm else "in")
            self._made[key] = a if scale == 1.0 else a * scale
        return self._made[key]


def _settled(job: Job, number: int | None, source: ActivationSource) -> Job:
    config = TrainConfig() if job.config is None else job.config
    if not isinstance(config, TrainConfig):
        raise ValueError(f"[fit] config must be a TrainConfig but got {type(config).__name__}.")
    if not isinstance(job.sae, nn.Module):
        raise ValueError(
            f"[fit] sae must be an nn.Module but got {getattr(job.sae, '__name__', type(job.sae).__name__)}."
        )
    if job.optimizer is not None and not isinstance(job.optimizer, optim.Optimizer):
        raise ValueError(f"[fit] optimizer must be one of MLX's but got {job.optimizer!r}.")
    if config.epochs is not None:
        rows = source_rows(source)
        if rows is None:
            raise ValueError(
                "[fit] epochs must come with data that know their length (rows); give total_tokens instead."
            )
        config = replace(config, total_tokens=max(1, math.ceil(rows_in(config.epochs, rows))), epochs=None)
    if config.wake is None:  # decided before the first checkpoint, which a resumed run is held to
        sae, wakes = job.sae, None
        if _wakes(sae):
            wakes = config.loss.preset_for(sae.rule) if job.loss is None else getattr(job.loss, "auxk", None)
        config = replace(config, wake=WAKE if wakes else 0.0)
    name = job.name or ("" if number is None else str(number))
    return replace(job, config=config, callbacks=listed(job.callbacks), name=name)


def _wakes(sae: Any) -> TypeGuard[SAE]:
    """Whether a bias can rise until its latent fires."""
    return isinstance(sae, SAE) and "bias" in sae.trainable_parameters().get("encoder", {})


def source_rows(source: Any) -> int | None:
    """Rows in one pass over the data, where the source knows."""
    rows = getattr(source, "rows", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def _assemble(job: Job, source: ActivationSource, start: _Start, saved: dict[str, Any] | None) -> Run:
    """A run before its first step, or, with the state ``saved`` in a checkpoint, one that waits for its arrays."""
    sae, config = job.sae, job.config
    assert config is not None
    i, j = _places(job.fields, len(start.sample))
    fields = (i,) if i == j else (i, j)
    widths = Widths(sae, start.sample[i])
    scale: tuple[float, float] = (1.0, 1.0) if saved is None else tuple(saved["scale"])  # type: ignore[assignment]
    norm: dict[str, mx.array] = {}
    centre = None
    if not widths.ours and (config.normalize, config.b_dec_init) != ("none", "keep"):
        raise ValueError(
            "[fit] normalize must be none and b_dec_init keep for a module of your own "
            f"but got {config.normalize} and {config.b_dec_init}."
        )
    if not widths.ours and config.decoder_init not in (None, "keep"):
        raise ValueError(
            f"[fit] decoder_init must be None or keep for a module of your own but got {config.decoder_init}."
        )
    if widths.ours:
        _check_widths(widths, job.fields, start.sample)
    sides = (("in", 0), ("out", 1))[: len(fields)]
    if config.normalize in ("mean_std", "whiten"):
        for name, which in sides:
            if saved is not None:  # the checkpoint has them, and the sample is not theirs
                found = _unmeasured(config.normalize, start.sample[fields[which]].shape[-1])
            elif config.normalize == "mean_std":
                found = dict(zip(("mean", "std"), start.of(column_statistics, fields, which), strict=True))
            else:
                measured: Spread = start.of(spread, fields, which)
                there, back = measured.whitening(config.whitening)
                found = {"mean": measured.mean, "whiten": there, "unwhiten": back}
            norm |= {f"{what}_{name}": a for what, a in found.items()}
    if norm and "weight" not in sae.parameters().get("decoder", {}):
        raise ValueError(
            f"[fit] normalize must not be {config.normalize} where the decoder is tied to the encoder."
        )
    if config.normalize == "whiten" and config.loss.end_to_end is not None:
        raise ValueError("[fit] normalize must not be whiten where the loss is end to end.")
    by_token = config.normalize == "layer_norm"
    if by_token and len(fields) > 1:
        raise ValueError("[fit] normalize must not be layer_norm where the target is not the input.")
    if widths.ours and not by_token and sae.normalize_activations == "layer_norm":
        raise ValueError(
            f"[fit] normalize must be layer_norm for an SAE that normalises each token but got {config.normalize}."
        )
    ranked = getattr(sae, "rank_by_decoder_norm", False)
    if norm and ranked:
        raise ValueError(
            f"[fit] normalize must not be {config.normalize} where latents are ranked by decoder norm."
        )
    # Sources of a crosscoder get a scale each. Folding that changes decoder norms, so not where they rank latents.
    apart = getattr(sae, "n_sources", 1) > 1 and not ranked and config.normalize == "expected_norm"
    if apart:
        if saved is None:
            weights = sae.metadata.get("source_weights")
            mean, std = source_statistics(start.rows(fields)[0], sae.n_sources, weights)
        else:
            mean, std = _unmeasured("mean_std", sae.d_in).values()
        norm = {"mean_in": mean, "std_in": std}
    if norm and (stay := folded(sae) & frozen(sae)):
        raise ValueError(
            f"[fit] normalize must not be {config.normalize} where what it is folded into is frozen: {sorted(stay)}."
        )
    if saved is None:
        if config.normalize == "expected_norm" and not apart:
            s_in = start.of(expected_norm_scale, fields, 0)
            same = sae.apply_b_dec_to_input or len(fields) == 1
            scale = (s_in, s_in if same else start.of(expected_norm_scale, fields, 1))
        if config.b_dec_init != "keep" and (untrained(sae) or not bool(sae.decoder.bias.any())):
            what = geometric_median if config.b_dec_init == "geometric_median" else _mean
            centre = start.of(what, fields, len(fields) - 1, by_token)
            if norm:
                centre = normalized(centre, norm, "out" if "mean_out" in norm else "in")
    working = copied(sae)
    working.set_dtype(mx.float32)
    if by_token:
        working.normalize_activations = "layer_norm"  # refuses what cannot
        working.normalize_activations = "none"  # batches come normalised
    if scale != (1.0, 1.0):
        working.update(scaled_params(sae, working.parameters(), *scale))
    if norm and saved is None and not untrained(sae):  # what it has learned is for raw activations
        working.update(unnormalized(sae, working.parameters(), inverted(norm)))
    from_data = widths.ours and waits_for_data(sae)
    stay = frozen(sae)
    free = widths.ours and untrained(sae) and stay.isdisjoint(("encoder.weight", "decoder.weight"))
    how = (config.decoder_init if free else None) or "keep"
    if saved is None and (how != "keep" or from_data):
        batch = _Batch(tuple(start.rows(fields)))
        seen = [batch.scaled(place, norm, scale[place], place, by_token) for place in range(len(fields))]
        if centre is not None and "decoder.bias" not in stay:
            working.decoder.bias = centre * scale[1]
        if how != "keep":
            initialize(working, *seen, how=how, seed=config.seed)
        if from_data:
            begin(working, seen[0][:_START_ROWS], seen[-1][:_START_ROWS], config.loss.target_l0)
    params = _tree(working.trainable_parameters())
    if not params:
        raise ValueError("[fit] the SAE must have a parameter to train but all are frozen.")
    if config.wake and not _wakes(sae):
        raise ValueError(
            f"[fit] wake must be 0 where no encoder bias of an SAE of ours is trained but got {config.wake}."
        )
    if centre is not None and "bias" in params.get("decoder", {}):
        params["decoder"]["bias"] = centre * scale[1]
    own_rate: Callable[[int], float] | None = None
    optimizer = job.optimizer
    if optimizer is not None:
        optimizer, own_rate = split_schedule(optimizer)
    engine, loss, pressure = job.engine, job.loss, None
    if engine is None:
        if widths.ours and (loss is None or isinstance(loss, Loss)):
            if loss is None and config.loss.target_l0 is not None:
                pressure = SparsityController(config.loss.target_l0)
            loss = loss or config.loss.build(working, config.total_steps, pressure=pressure)
            engine = make_engine(config.engine, working, loss, config, optimizer)
        elif isinstance(loss, Loss):
            raise ValueError("[fit] loss must be a function (x, x_recon, z, step) for a module of your own.")
        else:
            engine = ModuleEngine(working, loss, config, optimizer)
    state = TrainState(
        params=params,
        optimizer=engine.optimizer_state(params),
        tokens_since_fired=mx.zeros(widths.d_sae, mx.int32),
        failed=mx.array([-1, 0], mx.int32),
        rule=working.rule.initial_state() if widths.ours else {},
        scale=scale,
        norm=norm,
    )
    # Only the state holds what is trained: a reference left behind would keep the first weights for the whole run.
    working.update(tree_map(lambda p: mx.broadcast_to(mx.array(0, p.dtype), p.shape), params))
    rate = _rate(job, config, widths, own_rate)
    built = loss if isinstance(loss, Loss) else None
    run = Run(
        sae, config, source, engine, rate, state, widths, built, working, fields=job.fields, name=job.name
    )
    run.watchers = [] if pressure is None else [pressure]
    return run


def _unmeasured(normalize: str, d: int) -> dict[str, mx.array]:
    """Statistics of width ``d`` that a checkpoint will fill in."""
    square = {"whiten": mx.eye(d), "unwhiten": mx.eye(d)}
    return {"mean": mx.zeros(d)} | (square if normalize == "whiten" else {"std": mx.ones(d)})


def _rate(
    job: Job, config: TrainConfig, widths: Widths, own: Callable[[int], float] | None
) -> Callable[[int], float]:
    o = config.optimizer
    if own is not None:
        factor = job.schedule
        return own if factor is None else lambda step: own(0) * factor(step)
    base = o.learning_rate or default_learning_rate(widths.d_sae)
    if job.schedule is None and (rising := in_steps(o.warmup, config.total_steps)) > config.total_steps:
        warnings.warn(
            f"[fit] warmup should be shorter than the run but takes {rising} steps of {config.total_steps}: the learning "
            "rate will not reach its peak.",
            stacklevel=2,
        )
    factor = job.schedule or warmup_decay(config.total_steps, warmup=o.warmup, decay=o.decay, shape=o.shape)
    return lambda step: base * float(factor(step))


def _advance(run: Run, batch: _Batch) -> None:
    """One step, launched and not awaited: the host prepares the next batch meanwhile."""
    state = run.state
    scaled, target = batch.pair(run)
    n = scaled.shape[0]
    lr = run.learning_rate(state.step)
    if not 0 <= lr < math.inf:
        raise ValueError(
            f"[fit] the learning rate must be finite and at least 0 but is {lr} in step {state.step} (counted from 0)."
        )
    more: dict[str, Any] = {} if (context := batch.context(run)) is None else {"context": context}
    arrays, metrics = run.engine.step(
        state.arrays, scaled, target, lr=lr, step=state.step, auxk=state.auxk_active, **more
    )
    run.state = replace(state, **arrays, step=state.step + 1, tokens=state.tokens + n)
    del state  # the last reference to the old arrays: now the update may reuse their memory
    mx.async_eval(arrays, metrics)
    run.metrics = metrics | {"lr": mx.array(lr)}


def _look(run: Run) -> None:
    run.raise_if_failed()
    dead = run.state.tokens_since_fired >= run.config.dead_after
    run.state = replace(run.state, auxk_active=bool(dead.any().item()))


def _record(run: Run, clock: Throughput) -> dict[str, Any]:
    record: dict[str, Any] = {"step": run.state.step, "tokens": run.state.tokens}
    record |= {name: value.item() for name, value in run.metrics.items()}
    run.raise_if_failed()
    record["tokens_per_s"] = clock.tokens_per_s
    clock.restart()
    run.history.append(record)
    return record


def _evaluate(
    run: Run, x: mx.array, y: mx.array, context: Context | None
) -> tuple[dict[str, mx.array], mx.array]:
    """Metrics of one batch without a step, and how often each latent fired."""
    run.settle()
    own = getattr(run.engine, "evaluate", None)
    if own is not None:
        return own(run.state.arrays, x, y, step=run.state.step)
    assert run.loss is not None
    with substituted(run.module, run.state.params) as sae:
        code, _, pre_acts = sae.learn(x, run.state.rule)
        scheduled = run.loss.scheduled(run.state.step, sae.d_sae, run.config.seed)
        if context is not None:
            scheduled |= context.named()
        forward = Forward(sae, x, y, code, sae.decode(code, x), None, pre_acts, scheduled)
        total, terms = run.loss(forward)
        return terms | {"loss": total, "l0": l0(code)}, fire_counts(code, run.widths.d_sae)


def _tell(run: Run, event: str, *arguments: Any) -> None:
    for watcher in run.watchers:
        getattr(watcher, event)(run, *arguments)


def _named(watchers: Iterable[Callback]) -> Iterator[tuple[str, Callback]]:
    """Watchers by class and number, so that one more of another kind does not shift them."""
    seen: dict[str, int] = {}
    for watcher in watchers:
        kind = watcher.kind
        seen[kind] = seen.get(kind, -1) + 1
        yield f"{kind}.{seen[kind]}", watcher


def _part(i: int) -> str:
    return "state" if i == 0 else f"state_{i}"


def _places(fields: tuple[int, ...] | None, n: int) -> tuple[int, int]:
    if fields is None:
        return (0, 0) if n == 1 else (0, 1)
    if not 1 <= len(fields) <= 2 or not all(0 <= i < n for i in fields):
        raise ValueError(f"[fit] fields must be one or two numbers below {n} but got {fields}.")
    return fields[0], fields[-1]


def _walk(validation: Validation, batch_size: int) -> Iterator[tuple[mx.array, ...]]:
    """Batches of at most ``batch_size`` rows, or as they are given, none much shorter than the others: a term that divides
    by the variance of its batch says nothing about a few rows, and of one row it is the squared error itself."""
    if isinstance(validation, (mx.array, np.ndarray)):
        validation = (validation,)
    if isinstance(validation, tuple) and all(isinstance(a, (mx.array, np.ndarray)) for a in validation):
        n = len(validation[0])
        parts = -(-n // batch_size)
        for begin, end in itertools.pairwise(n * i // max(parts, 1) for i in range(parts + 1)):
            yield tuple(mx.array(a[begin:end]) for a in validation)
        return
    if not isinstance(validation, Iterable):
        raise ValueError(
            f"[fit] validation must be an array, a pair of them, or batches but got {type(validation).__name__}."
        )
    if iter(validation) is validation:
        raise ValueError("[fit] validation must be something that can be walked again but is an iterator.")
    held: list[tuple[mx.array, ...]] = []  # the last two
    for batch in validation:
        held.append(tuple(mx.array(a) for a in (batch if isinstance(batch, tuple) else (batch,))))
        if len(held) > 2:
            yield held.pop(0)
    short = len(held) == 2 and 2 * len(held[1][0]) < len(held[0][0])
    if short and all(len(_activations(batch)) == len(batch) for batch in held):
        half = (len(held[0][0]) + len(held[1][0])) // 2
        both = [mx.concatenate(list(field)) for field in zip(*held, strict=True)]
        held = [tuple(a[:half] for a in both), tuple(a[half:] for a in both)]
    yield from held


def _mean(x: mx.array) -> mx.array:
    return x.astype(mx.float32).mean(axis=0)


def _check_widths(widths: Widths, fields: tuple[int, ...] | None, batch: tuple[mx.array, ...]) -> None:
    i, j = _places(fields, len(batch))
    x, y = batch[i], batch[j]
    for name, a, width in (("x", x, widths.x), ("y", y, widths.y)):
        if a.ndim != 2 or a.shape[1] != width or a.shape[0] != x.shape[0]:
            raise ValueError(
                f"[fit] {name} must have shape [n, {width}] with n={x.shape[0]} but got {a.shape}."
            )
        if not mx.issubdtype(a.dtype, mx.floating):
            raise ValueError(f"[fit] {name} must be floating point but got {a.dtype}.")
    if x.shape[0] == 0:
        raise ValueError("[fit] a batch must have at least one row but got none.")


def _check_batch(run: Run, batch: tuple[mx.array, ...]) -> None:
    _check_widths(run.widths, run.fields, _activations(batch))


def _activations(batch: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
    """A batch without the tokens and places of whole contexts."""
    whole = len(batch) > 2 and not any(mx.issubdtype(a.dtype, mx.floating) for a in batch[-2:])
    return batch[:-2] if whole else batch


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


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._begin = time.perf_counter()
        mx.reset_peak_memory()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def result(self, run: Run) -> dict[str, float]:
        whole = time.perf_counter() - self._begin
        return self._seconds | {
            "total": whole,
            "steps": run.state.step,
            "tokens_per_s": run.state.tokens / whole,
            "peak_bytes": mx.get_peak_memory(),
        }


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
