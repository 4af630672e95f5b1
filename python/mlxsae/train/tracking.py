"""Experiment tracking: Weights & Biases, TensorBoard (tensorboardX) and a folder of plain files, behind one glue.

The libraries do the logging. Names are those of the field: ``train/loss``, ``train/recon_loss``, ``train/l0``,
``train/dead_fraction``, ``train/l1_loss``, ``train/learning_rate``, ``val/loss``, ``val/l0``, ``val/dead_fraction``.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlxsae.io import atomic
from mlxsae.loss import RECONSTRUCTION
from mlxsae.train.callbacks import Callback

if TYPE_CHECKING:
    from mlxsae.train.loop import Run

_RENAMED = {"lr": "learning_rate", "l1": "l1_loss"} | {name: "recon_loss" for name in RECONSTRUCTION}


def tracked_names(record: Mapping[str, Any]) -> dict[str, float]:
    """A record of ``on_log`` or ``on_validation`` under the field's names. The reconstruction term goes by its own name
    and as ``recon_loss``."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if name == "step":
            continue
        room, bare = ("val", name.removeprefix("val_")) if name.startswith("val_") else ("train", name)
        if room == "train" and bare == "tokens" and any(n.startswith("val_") for n in record):
            continue
        found[f"{room}/{_RENAMED.get(bare, bare)}"] = float(value)
        if bare in RECONSTRUCTION:
            found[f"{room}/{bare}"] = float(value)
    return found


class Tracker(Protocol):
    """Where records go. ``step`` never falls, except that a resumed run repeats steps after its checkpoint."""

    def begin(self, name: str, config: Mapping[str, Any], step: int) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def figure(self, name: str, figure: Any, step: int) -> None:
        """A matplotlib figure, HTML (a str, or what has ``_repr_html_``), or an image ``[h, w, 3]`` of uint8."""
        ...

    def end(self) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class WandbTracker:
    """Weights & Biases. ``options`` go to ``wandb.init``, such as ``mode="offline"``, ``tags``, ``entity``, ``dir``."""

    def __init__(self, project: str, name: str | None = None, **options: Any):
        self._wandb = _library("wandb", "wandb")
        self._project, self._name, self._options = project, name, options
        self._run: Any = None
        self._id: str | None = None

    def begin(self, name: str, config: Mapping[str, Any], step: int) -> None:
        again = {"id": self._id, "resume": "allow"} if self._id else {}
        self._run = self._wandb.init(
            project=self._project,
            name=self._name or name or None,
            config=dict(config),
            reinit="create_new",
            **(self._options | again),
        )
        self._id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        html = _html(figure)
        shown = self._wandb.Image(figure) if html is None else self._wandb.Html(html, inject=False)
        self._run.log({name: shown}, step=step)

    def end(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def state(self) -> dict[str, Any]:
        return {"id": self._id}

    def restore(self, state: dict[str, Any]) -> None:
        self._id = state["id"]


class TensorBoardTracker:
    """Event files for TensorBoard, written by tensorboardX, in ``directory`` (or a folder of the run's name in it)."""

    def __init__(self, directory: str | os.PathLike):
        self._library = _library("tensorboardX", "tensorboard")
        self._directory = Path(directory)
        self._writer: Any = None

    def begin(self, name: str, config: Mapping[str, Any], step: int) -> None:
        place = self._directory / _file_name(name) if name else self._directory
        # A resumed run's later events are void.
        purge = {"purge_step": step + 1} if step else {}
        # Files are named by the second; two sessions within one must not share a name.
        self._writer = self._library.SummaryWriter(str(place), filename_suffix=f".{step:08d}", **purge)
        self._writer.add_text(
            "config", "```json\n" + json.dumps(config, indent=2, default=str) + "\n```", step
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        html = _html(figure)
        if html is not None:
            self._writer.add_text(name, html, step)
        elif hasattr(figure, "savefig"):
            self._writer.add_figure(name, figure, step, close=False)
        else:
            self._writer.add_image(name, np.asarray(figure), step, dataformats="HWC")

    def end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class LocalTracker:
    """A folder for each run: ``run.json`` (name, configuration), ``metrics.jsonl`` (a line a record, with ``step``),
    ``figures/``. Needs nothing."""

    def __init__(self, directory: str | os.PathLike):
        self._root = Path(directory)
        self.directory = self._root
        self._file: Any = None

    def begin(self, name: str, config: Mapping[str, Any], step: int) -> None:
        self.directory = self._root / _file_name(name) if name else self._root
        if (held := name_of(self.directory)) not in (None, name):
            raise ValueError(
                f"[tracking] {name!r} must have a folder of its own but {self.directory} holds {held!r}."
            )
        kept = [r for r in read_metrics(self.directory) if r["step"] <= step] if step else []
        lines = "".join(json.dumps(r) + "\n" for r in kept)
        atomic.write_files(
            self.directory,
            {
                "run.json": atomic.json_writer({"name": name, "config": _plain(config)}),
                "metrics.jsonl": lambda file: atomic.void(file.write(lines.encode())),
            },
        )
        self._file = open(self.directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps(_plain({"step": step} | dict(metrics))) + "\n")
        self._file.flush()

    def figure(self, name: str, figure: Any, step: int) -> None:
        html, place = _html(figure), self.directory / "figures"
        stem = f"{_file_name(name)}_{step:08d}"
        if html is not None:
            atomic.write_files(place, {f"{stem}.html": lambda file: atomic.void(file.write(html.encode()))})
        elif hasattr(figure, "savefig"):
            atomic.write_files(
                place, {f"{stem}.png": lambda file: atomic.void(figure.savefig(file, format="png"))}
            )
        else:
            image = np.ascontiguousarray(figure)
            atomic.write_files(
                place, {f"{stem}.npy": lambda file: atomic.void(np.save(file, image, allow_pickle=False))}
            )

    def end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class TrackingCallback(Callback):
    """Sends a run's records to ``tracker``, and what describes the run once."""

    def __init__(self, tracker: Tracker, name: str = ""):
        self.tracker, self.name = tracker, name

    @property
    def kind(self) -> str:
        return f"{type(self).__name__}({type(self.tracker).__name__})"

    def of(self, name: str) -> Callback:
        own, tracker = copy.copy(self), copy.copy(self.tracker)
        own.tracker, own.name = tracker, "-".join(filter(None, (self.name, name)))
        if isinstance(tracker, WandbTracker) and tracker._name:
            tracker._name = f"{tracker._name}-{name}"
        return own

    def on_begin(self, run: Run) -> None:
        self.tracker.begin(self.name or run.name, describe(run), run.state.step)

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        self.tracker.log(record["step"], tracked_names(record))

    def on_validation(self, run: Run, record: dict[str, Any]) -> None:
        self.tracker.log(record["step"], tracked_names(record))

    def on_end(self, run: Run) -> None:
        self.tracker.end()

    def state(self) -> dict[str, Any]:
        return self.tracker.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.tracker.restore(state)


class WandbCallback(TrackingCallback):
    """Log to Weights & Biases: ``WandbCallback(project="sae", name="k32", mode="offline")``. A resumed run goes on in the
    same W&B run. Needs ``pip install mlxsae[wandb]``."""

    def __init__(self, project: str, name: str | None = None, **options: Any):
        super().__init__(WandbTracker(project, name, **options))


class TensorBoardCallback(TrackingCallback):
    """Log to TensorBoard: ``TensorBoardCallback("logs")``. Needs ``pip install mlxsae[tensorboard]``."""

    def __init__(self, directory: str | os.PathLike):
        super().__init__(TensorBoardTracker(directory))


def describe(run: Run) -> dict[str, Any]:
    """What is logged once: the configuration, sizes (``rows`` of data that know their length), and what the SAE's metadata
    say of model and hook point."""
    found = {"train": run.config.to_dict(), "engine": run.engine.name, "d_sae": run.widths.d_sae}
    found |= {"d_in": run.widths.x, "d_out": run.widths.y, "rows": getattr(run.source, "rows", None)}
    if run.widths.ours:
        rule = run.sae.rule
        found |= {"architecture": rule.architecture, "rule": rule.config(), "metadata": run.sae.metadata}
    return _plain(found)


@dataclass(frozen=True)
class Comparison:
    """Runs by one metric, the best first. ``rows`` hold ``run``, ``last``, ``best``, ``step`` (of the best) and
    ``records``; printing shows them as a table."""

    metric: str
    rows: list[dict[str, Any]]

    @property
    def best(self) -> str:
        return self.rows[0]["run"]

    def __str__(self) -> str:
        cells = [("run", f"best {self.metric}", "at step", "last")]
        cells += [(r["run"], f"{r['best']:.6g}", str(r["step"]), f"{r['last']:.6g}") for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
        )


class Experiment:
    """Several runs under one name, tracked by any of ``wandb``, ``tensorboard`` and ``local``.

    ::

        experiment = Experiment("k sweep", track_with=["local"], config={"layer": 10})
        for k in (16, 32):
            experiment.start_run(f"k{k}")
            fit(sae(k), data, callbacks=[experiment.get_callback()])
            experiment.log_metrics(evaluate(...))
            experiment.end_run()
        print(experiment.compare_runs("recon_loss"))

    Parameters
    ----------
    config : logged with every run.
    directory : where ``local`` and ``tensorboard`` write, in a folder of the experiment's name.
    wandb : options of ``wandb.init``, such as ``{"mode": "offline"}``; the project is ``name`` unless given.
    """

    def __init__(
        self,
        name: str,
        track_with: str | Iterable[str] = ("local",),
        config: Mapping[str, Any] | None = None,
        *,
        directory: str | os.PathLike = "experiments",
        wandb: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.directory = Path(directory) / _file_name(name)
        self._backends = [track_with] if isinstance(track_with, str) else list(track_with)
        known = ("local", "tensorboard", "wandb")
        if unknown := sorted(set(self._backends) - set(known)):
            raise ValueError(f"[Experiment] track_with must name some of {list(known)} but got {unknown}.")
        self._config, self._wandb = dict(config or {}), dict(wandb or {})
        self._records: dict[str, list[dict[str, Any]]] = {}
        self._trackers: dict[str, Tracker] = {}
        self._current: str | None = None
        self._settings: dict[str, Any] = {}
        self._begun = False
        self._step = 0

    def start_run(self, name: str, config: Mapping[str, Any] | None = None) -> Experiment:
        """Begin a run; works as a context manager that ends it. One of this name is begun anew, unless ``fit`` goes on
        from a checkpoint before anything else is logged: then what was logged up to there stays."""
        if self._current is not None:
            raise ValueError(f"[Experiment] {self._current} must be ended before {name} can begin.")
        made: dict[str, Any] = {
            "local": lambda: LocalTracker(self.directory / "local"),
            "tensorboard": lambda: TensorBoardTracker(self.directory / "tensorboard"),
            "wandb": lambda: WandbTracker(**({"project": self.name} | self._wandb)),
        }
        self._trackers = {backend: made[backend]() for backend in self._backends}
        self._settings = self._config | dict(config or {})
        self._current, self._begun, self._step = name, False, 0
        return self

    def _begin(self, step: int = 0, earlier: Iterable[dict[str, Any]] = ()) -> None:
        """Begin to track at ``step``, of a resumed run after the records ``earlier``; once a run."""
        self._running()
        if self._begun:
            return
        name = self._current or ""
        for tracker in self._trackers.values():
            tracker.begin(name, self._settings, step)
        local = self._trackers.get("local")
        kept = read_metrics(local.directory) if isinstance(local, LocalTracker) else []
        self._begun, self._step, self._records[name] = True, step, kept or list(earlier)

    def get_callback(self) -> Callback:
        """For ``fit(callbacks=[...])``: sends the run's metrics here."""
        self._running()
        return _ExperimentCallback(self)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers of one's own, by default at the last step that was logged."""
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        self._begin()
        self._step = self._step if step is None else step
        self._records[self._current or ""].append({"step": self._step} | numbers)
        for tracker in self._trackers.values():
            tracker.log(self._step, numbers)

    def log_figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure, HTML, or an image ``[h, w, 3]`` of uint8."""
        if _html(figure) is None and not hasattr(figure, "savefig"):
            image = np.asarray(figure)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(
                    f"[Experiment] {name} must be a matplotlib figure, HTML, or an image [h, w, 3] of uint8 but got "
                    f"{type(figure).__name__} of {image.dtype} {image.shape}."
                )
        self._begin()
        for tracker in self._trackers.values():
            tracker.figure(name, figure, self._step)

    def end_run(self) -> None:
        self._begin()
        for tracker in self._trackers.values():
            tracker.end()
        self._trackers, self._current = {}, None

    def compare_runs(self, metric: str = "loss", mode: str = "min") -> Comparison:
        """All runs that logged ``metric`` (``recon_loss`` finds ``train/recon_loss``), the best value first. Runs of
        earlier processes count where they were tracked locally."""
        if mode not in ("min", "max"):
            raise ValueError(f"[Experiment] mode must be min or max but got {mode!r}.")
        runs = dict(self._records)
        local = self.directory / "local"
        if "local" in self._backends and local.is_dir():
            for folder in sorted(local.iterdir()):
                if (name := name_of(folder)) is not None:
                    runs.setdefault(name, read_metrics(folder))
        rows, seen = [], set()
        for name, records in runs.items():
            values = []
            for record in records:
                seen |= {n for n, v in record.items() if v is not None and math.isfinite(v)}
                found = next((k for k in (metric, f"train/{metric}", f"val/{metric}") if k in record), None)
                value = None if found is None else record[found]
                if value is not None and math.isfinite(value):
                    values.append((value, record["step"]))
            if values:
                best = (min if mode == "min" else max)(values, key=lambda entry: entry[0])
                rows.append(
                    {"run": name, "best": best[0], "step": best[1], "last": values[-1][0], "records": records}
                )
        if not rows:
            raise ValueError(
                f"[Experiment] metric must be one of {sorted(seen - {'step'})} but got {metric!r}; these have finite values."
            )
        rows.sort(key=lambda row: row["best"], reverse=mode == "max")
        return Comparison(metric, rows)

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._current is not None:
            self.end_run()

    def _running(self) -> None:
        if self._current is None:
            raise ValueError("[Experiment] start_run must come first.")


class _ExperimentCallback(Callback):
    def __init__(self, experiment: Experiment, prefix: str = ""):
        self._experiment, self._prefix = experiment, prefix

    def of(self, name: str) -> Callback:
        return _ExperimentCallback(self._experiment, f"{name}/")

    def _named(self, record: dict[str, Any]) -> dict[str, float]:
        return {self._prefix + name: value for name, value in tracked_names(record).items()}

    def on_begin(self, run: Run) -> None:
        earlier = [(r["step"], self._named(r)) for r in (*run.history, *run.validations)]
        earlier.sort(key=lambda entry: entry[0])
        self._experiment._begin(run.state.step, [{"step": step} | names for step, names in earlier])
        local = self._experiment._trackers.get("local")
        if isinstance(local, LocalTracker):
            atomic.write_files(local.directory, {"training.json": atomic.json_writer(describe(run))})

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        self._experiment.log_metrics(self._named(record), record["step"])

    def on_validation(self, run: Run, record: dict[str, Any]) -> None:
        self._experiment.log_metrics(self._named(record), record["step"])

    def state(self) -> dict[str, Any]:
        return {backend: tracker.state() for backend, tracker in self._experiment._trackers.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for backend, tracker in self._experiment._trackers.items():
            if backend in state:
                tracker.restore(state[backend])


def name_of(directory: Path) -> str | None:
    """Of the run that a :class:`LocalTracker` logged there; None where there is none."""
    path = directory / "run.json"
    return json.loads(path.read_text(encoding="utf-8"))["name"] if path.is_file() else None


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a :class:`LocalTracker`'s run; a last line that a crash cut short is left out."""
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _plain(value: Any) -> Any:
    """As JSON can hold it: null for NaN and infinity, the name of what it does not know."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"[Experiment] {name} must be a number but got {value!r}.") from None


def _html(figure: Any) -> str | None:
    if isinstance(figure, str):
        return figure
    return figure._repr_html_() if hasattr(figure, "_repr_html_") else None


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"


def _library(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"[tracking] {module} must be installed but is not: pip install 'mlxsae[{extra}]'."
        ) from error
