"""The libraries that draw a run's curves, as they are: TensorBoard reads what we wrote, W&B logs offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlxsae.train import Experiment, TensorBoardCallback, WandbCallback
from test_train_watch import NAMES, interrupted_and_resumed


def test_tracking_in_tensorboard(tmp_path: Path) -> None:
    interrupted_and_resumed(lambda: TensorBoardCallback(tmp_path / "logs"), tmp_path / "c")
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    assert [e.step for e in events.Scalars("train/loss")] == [10, 20, 30, 40, 50, 60]
    assert [e.step for e in events.Scalars("val/l0")] == [20, 40, 60]


def test_tracking_in_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, ids = [], []
    real = wandb.init

    def init(**options: Any) -> Any:
        run = real(**options)
        ids.append((run.id, options["config"]["d_sae"]))
        log = run.log
        run.log = lambda metrics, step: (logged.append((step, metrics)), log(metrics, step=step))
        return run

    monkeypatch.setattr(wandb, "init", init)
    interrupted_and_resumed(
        lambda: WandbCallback("test", "mine", mode="offline", dir=str(tmp_path)), tmp_path / "c"
    )
    assert set().union(*(metrics for _, metrics in logged)) >= NAMES
    assert ids[0] == ids[1]  # one run of W&B
    assert ids[0][1] == 48
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_experiment_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"mode": "offline", "dir": str(tmp_path)}
    experiment = Experiment("study", track_with=["wandb"], wandb=options, directory=tmp_path)
    for name in "ab":
        experiment.start_run(name)
        experiment.log_metrics({"score": ord(name)}, step=1)
        experiment.log_figure("picture", "<p>picture</p>")
        experiment.end_run()
    assert experiment.compare_runs("score", mode="max").best == "b"
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_an_experiment_goes_on_in_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids: list[str] = []
    begun: list[Experiment] = []
    real = wandb.init

    def init(**options: Any) -> Any:
        run = real(**options)
        ids.append(run.id)
        return run

    monkeypatch.setattr(wandb, "init", init)

    def callback() -> Any:
        for earlier in begun:
            earlier.end_run()
        options = {"mode": "offline", "dir": str(tmp_path)}
        begun.append(Experiment("study", track_with="wandb", wandb=options, directory=tmp_path))
        return begun[-1].start_run("a").get_callback()

    interrupted_and_resumed(callback, tmp_path / "c")
    begun[-1].end_run()
    assert len(ids) == 2
    assert ids[0] == ids[1]
