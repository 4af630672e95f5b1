"""Callbacks that act: keep the best SAEs, stop early."""

from __future__ import annotations

import copy
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx.utils import tree_flatten

from mlxsae.io import arrays, atomic, native
from mlxsae.loss import RECONSTRUCTION
from mlxsae.sae import SAE
from mlxsae.train.callbacks import Callback, at_least_1

if TYPE_CHECKING:
    from mlxsae.train.loop import Run

_ALIASES = {"learning_rate": "lr", "l1_loss": "l1"}


def metric_of(record: dict[str, Any], metric: str) -> float | None:
    """``metric`` in a record of ``on_log`` or ``on_validation``; None where it is not in it.

    ``train/loss`` and ``loss`` are the same, so are ``val/loss`` and ``val_loss``; ``recon_loss`` (also ``recon``) is
    the reconstruction term, whatever it is called.
    """
    name = metric.replace("/", "_").removeprefix("train_")
    prefix, bare = ("val_", name.removeprefix("val_")) if name.startswith("val_") else ("", name)
    names = [bare, _ALIASES.get(bare, bare)]
    if bare in ("recon", "recon_loss"):
        names += ["recon_loss", "recon", *RECONSTRUCTION]
    found = next((prefix + n for n in names if prefix + n in record), None)
    return None if found is None else float(record[found])


class _Measured(Callback):
    """Follows one metric: of validation if its name begins with ``val``, else of the log."""

    def __init__(self, metric: str, mode: str):
        if mode not in ("min", "max"):
            raise ValueError(f"[callback] mode must be min or max but got {mode!r}.")
        if not isinstance(metric, str):
            raise ValueError(f"[callback] metric must be a name but got {metric!r}.")
        self.metric, self.mode = metric, mode

    def of(self, name: str) -> Callback:
        return copy.deepcopy(self)

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        if not self.metric.startswith("val"):
            self._take(run, record)

    def on_validation(self, run: Run, record: dict[str, Any]) -> None:
        if self.metric.startswith("val"):
            self._take(run, record)

    def on_begin(self, run: Run) -> None:
        if self.metric.startswith("val") and not run.validated:
            raise ValueError(f"[callback] {self.metric} must be measured but the run has no validation data.")

    def _take(self, run: Run, record: dict[str, Any]) -> None:
        value = metric_of(record, self.metric)
        if value is None:
            raise ValueError(f"[callback] metric must be one of {sorted(record)} but got {self.metric!r}.")
        self.measured(run, value)

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` is better than ``b``; NaN never is."""
        return math.isfinite(a) and (a < b if self.mode == "min" else a > b)

    @property
    def worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf

    def measured(self, run: Run, value: float) -> None:
        raise NotImplementedError


class EarlyStoppingCallback(_Measured):
    """Stop after ``patience`` measurements in a row that were not better than the best by more than ``min_delta``.

    ``metric`` is one of the log's (``loss``) or, with validation data, ``val_loss`` and so on.
    """

    def __init__(
        self, patience: int = 10, metric: str = "val_loss", *, min_delta: float = 0.0, mode: str = "min"
    ):
        super().__init__(metric, mode)
        at_least_1("EarlyStoppingCallback", patience=patience)
        if not min_delta >= 0:
            raise ValueError(f"[EarlyStoppingCallback] min_delta must not be negative but got {min_delta!r}.")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = self.worst, 0

    def measured(self, run: Run, value: float) -> None:
        margin = self.min_delta if self.mode == "max" else -self.min_delta
        if self.better(value, self.best + margin):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(f"{self.metric} has not been better than {self.best:.6g} for {self.waited} measurements")

    def state(self) -> dict[str, Any]:
        return {"best": self.best if math.isfinite(self.best) else None, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = self.worst if state["best"] is None else state["best"]
        self.waited = state["waited"]


class CheckpointCallback(_Measured):
    """Every ``save_every`` steps save the SAE as it would come out, and keep the ``keep_best`` best by ``metric``.

    Folders ``step_00005000`` in ``directory`` (by default ``best`` in the run's ``checkpoint_dir``) that
    ``mlxsae.io.load`` reads (of ``train_saes`` in a folder for each hook point); a module of one's own is saved as ``weights.safetensors``. A ``val_...`` metric is
    that of the latest validation, any other that of the very step. These are for use; what a run resumes from are ``fit``'s own checkpoints.
    """

    def __init__(
        self,
        save_every: int = 1000,
        keep_best: int = 1,
        *,
        metric: str = "loss",
        mode: str = "min",
        directory: str | os.PathLike | None = None,
    ):
        super().__init__(metric, mode)
        at_least_1("CheckpointCallback", save_every=save_every, keep_best=keep_best)
        self.save_every, self.keep_best = save_every, keep_best
        self.directory = None if directory is None else Path(directory)
        self.kept: list[tuple[float, str]] = []  # the best first
        self._latest: float | None = None

    @property
    def best(self) -> Path | None:
        """The folder of the best SAE so far."""
        return self.directory / self.kept[0][1] if self.kept and self.directory is not None else None

    def of(self, name: str) -> Callback:
        own = copy.deepcopy(self)
        own.directory = None if self.directory is None else self.directory / name
        return own

    def on_begin(self, run: Run) -> None:
        super().on_begin(run)
        if self.directory is None:
            if run.checkpoint_dir is None:
                raise ValueError(
                    "[CheckpointCallback] directory must be given where the run has no checkpoint_dir."
                )
            self.directory = run.checkpoint_dir / ("best" + run.name)
        self.directory.mkdir(parents=True, exist_ok=True)  # what cannot be written is found now

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        """Nothing: a training metric is read when it decides."""

    def measured(self, run: Run, value: float) -> None:
        self._latest = value

    def on_step(self, run: Run) -> None:
        if run.state.step % self.save_every and not run.finished:
            return
        if not self.metric.startswith("val"):
            self._take(run, {name: value.item() for name, value in run.metrics.items()})
        if self._latest is None or not math.isfinite(self._latest):
            return
        assert self.directory is not None
        if len(self.kept) == self.keep_best and not self.better(self._latest, self.kept[-1][0]):
            return
        name = f"step_{run.state.step:08d}"
        export(run.export(), self.directory / name)
        self.kept.append((self._latest, name))
        self.kept.sort(key=lambda entry: entry[0], reverse=self.mode == "max")
        for _, old in self.kept[self.keep_best :]:
            shutil.rmtree(self.directory / old, ignore_errors=True)
        del self.kept[self.keep_best :]

    def state(self) -> dict[str, Any]:
        return {"kept": [list(entry) for entry in self.kept], "latest": self._latest}

    def restore(self, state: dict[str, Any]) -> None:
        self.kept = [(value, name) for value, name in state["kept"]]
        self._latest = state["latest"]


def export(sae: Any, directory: Path) -> None:
    """Save an SAE in the native format, what that does not hold and any other module as ``weights.safetensors``."""
    if isinstance(sae, SAE) and native.holds(sae):
        native.save(sae, directory)
    else:
        weights: Any = dict(tree_flatten(sae.parameters()))
        atomic.write_files(directory, {"weights.safetensors": arrays.writer(weights)})
