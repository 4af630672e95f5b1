"""What watches a run: validation, plain callbacks, keeping the best, stopping early, tracking, profiling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxsae.data import ArraySource
from mlxsae.io import load
from mlxsae.metrics import evaluate
from mlxsae.sae import HierarchicalSAE, ReLU
from mlxsae.train import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    Experiment,
    OptimizerConfig,
    Run,
    TensorBoardCallback,
    WandbCallback,
    fit,
)
from mlxsae.train.tracking import LocalTracker, TrackingCallback, read_metrics, tracked_names
from mlxsae.train.watchers import metric_of
from test_train import StopAt, assert_same_bits, config, dictionary_data, new_sae, source, weights

HELD_OUT = dictionary_data(500, seed=8)

# ---- validation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "certified"])
def test_validation_measures_the_sae_of_that_moment(precision: str) -> None:
    """Against the evaluator, on the exported SAE and raw activations."""
    found = []

    class Measure(Callback):
        def on_validation(self, run: Run, record: dict) -> None:
            sae = run.export()
            found.append((record, evaluate(sae, [mx.array(HELD_OUT)]), len(run.history)))

    settings = config(validate_every=25, batch_size=64, precision=precision)
    result = fit(new_sae(), source(), settings, validation=[mx.array(HELD_OUT)], callbacks=[Measure()])
    assert [r["step"] for r, *_ in found] == [25, 50, 60]
    assert [n for *_, n in found] == [2, 5, 6]
    assert result.validations == [r for r, *_ in found]
    for record, wanted, _ in found:
        assert record["val_fvu"] == pytest.approx(wanted["fvu"], rel=1e-4)
        assert record["val_loss"] == record["val_fvu"]  # AuxK is no part of it
        assert record["val_l0"] == pytest.approx(wanted["l0"], rel=1e-5)
        assert record["val_dead_fraction"] == pytest.approx(wanted["dead_fraction"])


def test_validation_changes_nothing_and_takes_arrays_and_pairs() -> None:
    plain = fit(new_sae(), source(), config())
    for held_out in (HELD_OUT, mx.array(HELD_OUT), [mx.array(HELD_OUT[:100]), mx.array(HELD_OUT[100:])]):
        watched = fit(new_sae(), source(), config(validate_every=7), validation=held_out)
        assert_same_bits(weights(watched.sae), weights(plain.sae))
        assert len(watched.validations) == 9
    y = (dictionary_data() @ np.ones((16, 3))).astype(np.float32)
    pair = (HELD_OUT, (HELD_OUT @ np.ones((16, 3))).astype(np.float32))
    data = ArraySource(dictionary_data(), y, batch_size=64)
    found = fit(new_sae(d_out=3), data, config(validate_every=20), validation=pair).validations
    assert found[-1]["val_fvu"] < found[0]["val_fvu"]
    with pytest.raises(ValueError, match="must be something that can be walked again but is an iterator"):
        fit(new_sae(), source(), config(), validation=iter([mx.array(HELD_OUT)]))
    with pytest.raises(ValueError, match="validation must have at least one row"):
        fit(new_sae(), source(), config(), validation=[])


@pytest.mark.parametrize("stream", [False, True])
def test_a_short_last_batch_does_not_rule_the_validation(stream: bool) -> None:
    """FVU of one row is its squared error, whatever the data's variance."""

    def measured(n: int) -> float:
        held_out: Any = mx.array(100 * HELD_OUT[:n])
        if stream:
            held_out = [held_out[i : i + 64] for i in range(0, n, 64)]
        settings = config(normalize="none", total_tokens=640, validate_every=100)
        data = ArraySource(dictionary_data(scale=30), batch_size=64)
        return fit(new_sae(), data, settings, validation=held_out).validations[-1]["val_fvu"]

    assert measured(257) == pytest.approx(measured(256), rel=0.1)


# ---- classes of people who know nothing of ours -------------------------------------------------------------


def test_plain_callbacks() -> None:
    class Mine:
        def __init__(self) -> None:
            self.lines: list[str] = []
            self.epochs: list[tuple[int, dict]] = []
            self.calls: list[str] = []

        def on_train_begin(self) -> None:
            self.calls.append("begin")

        def on_batch_end(self, step: int, loss: Any, metrics: dict) -> None:
            if step % 20 == 0:
                self.lines.append(
                    f"Step {step}: {loss:.3f} {metrics.get('fvu', 0):.3f} {metrics.get('no', 0):.1f}"
                )

        def on_epoch_end(self, epoch: int, metrics: dict) -> None:
            self.epochs.append((epoch, metrics))

        def on_validation_end(self, step: int, metrics: dict) -> None:
            self.calls.append(f"validation {step}")

        def on_train_end(self) -> None:
            self.calls.append("end")

    mine = Mine()
    data = ArraySource(dictionary_data(640), batch_size=64)
    result = fit(new_sae(), data, config(validate_every=30), callbacks=[mine], validation=HELD_OUT)
    assert [line.split(":")[0] for line in mine.lines] == ["Step 20", "Step 40", "Step 60"]
    assert mine.lines[0].endswith(f"{result.history[1]['loss']:.3f} {result.history[1]['fvu']:.3f} 0.0")
    assert [epoch for epoch, _ in mine.epochs] == [1, 2, 3, 4, 5, 6]
    assert mine.epochs[-1][1]["fvu"] == pytest.approx(result.history[-1]["fvu"])
    assert "val_loss" in mine.epochs[-1][1]
    assert mine.calls == ["begin", "validation 30", "validation 60", "end"]
    at_end = Mine()
    fit(new_sae(), [mx.array(dictionary_data(64))] * 5, config(), callbacks=[at_end])
    assert [epoch for epoch, _ in at_end.epochs] == [1]  # data of unknown length: at their end

    with pytest.raises(TypeError, match="a callback must be an object but got the class Mine"):
        fit(new_sae(), source(), config(), callbacks=[Mine])
    with pytest.raises(TypeError, match=r"a callback must have one of \['on_train_begin'"):
        fit(new_sae(), source(), config(), callbacks=[object()])


def test_a_plain_callback_may_call_what_it_likes_state(tmp_path: Path) -> None:
    class Own:
        seen = 0

        def state(self, step: int) -> int:
            return step

        def on_batch_end(self, step: int, loss: Any, metrics: Any) -> None:
            self.seen = self.state(step)

    watcher = Own()
    settings = config(total_tokens=128)
    fit(new_sae(), source(), settings, callbacks=[watcher], checkpoint_dir=tmp_path)
    fit(new_sae(), source(), settings, callbacks=[watcher], checkpoint_dir=tmp_path, resume=True)
    assert watcher.seen == 2


def test_epochs_in_place_of_tokens() -> None:
    data = ArraySource(dictionary_data(1000), batch_size=64)
    result = fit(new_sae(), data, config(epochs=2.5))
    assert result.state.tokens == 2560  # whole steps over 2500
    tenths = ArraySource(dictionary_data(100), batch_size=10)
    assert fit(new_sae(), tenths, config(epochs=1.1, batch_size=10)).state.step == 11
    part = ArraySource(dictionary_data(100), batch_size=29, epochs=0.29)
    assert [len(batch[0]) for batch in iter(part.next_batch, None)] == [29]
    with pytest.raises(ValueError, match="epochs must come with data that know their length"):
        fit(new_sae(), [mx.zeros((4, 16))], config(epochs=1))


# ---- stopping and keeping ----------------------------------------------------------------------------------


def stuck() -> Any:
    """A run that cannot get better."""
    return config(validate_every=4, optimizer=OptimizerConfig(learning_rate=1e-12), b_dec_init="keep")


@pytest.mark.parametrize("metric", ["val_loss", "val/recon_loss", "val_fvu"])
def test_early_stopping(metric: str, tmp_path: Path) -> None:
    watcher = EarlyStoppingCallback(patience=3, metric=metric, min_delta=1e-6)
    options: dict[str, Any] = {"validation": HELD_OUT}
    result = fit(new_sae(), source(), stuck(), callbacks=[watcher], checkpoint_dir=tmp_path, **options)
    assert result.state.step == 16  # the first is the best, then three that are not
    assert "has not been better than" in result.stopped
    # A run that was stopped is a finished one.
    again = EarlyStoppingCallback(patience=3, metric=metric, min_delta=1e-6)
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))
    resumed = fit(
        new_sae(), source(), stuck(), callbacks=[again], checkpoint_dir=tmp_path, resume=True, **options
    )
    assert (resumed.state.step, resumed.stopped) == (16, result.stopped)
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*")) == before
    # Its patience survives an interruption.
    with pytest.raises(KeyboardInterrupt):
        fit(
            new_sae(),
            source(),
            stuck(),
            callbacks=[EarlyStoppingCallback(3, metric, min_delta=1e-6), StopAt(13)],
            checkpoint_dir=tmp_path / "cut",
            **options,
        )
    more = EarlyStoppingCallback(3, metric, min_delta=1e-6)
    resumed = fit(
        new_sae(),
        source(),
        stuck(),
        callbacks=[more],
        checkpoint_dir=tmp_path / "cut",
        resume=True,
        **options,
    )
    assert resumed.state.step == 16


def test_early_stopping_of_what_is_no_number_and_at_the_end() -> None:
    watcher = EarlyStoppingCallback(patience=3, metric="loss")
    data = [{"loss": float("nan")}] * 3

    class Told:
        reason = ""

        def stop(self, reason: str) -> None:
            self.reason = reason

    run: Any = Told()
    for record in data:
        assert not run.reason
        watcher.on_log(run, record)
    assert "for 3 measurements" in run.reason
    settings = config(log_every=1, total_tokens=640)
    late = EarlyStoppingCallback(patience=9, metric="l0")  # TopK's never changes
    assert fit(new_sae(), source(), settings, callbacks=[late]).stopped == ""


def test_a_run_that_is_stopped_has_its_last_record_and_validation(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_step(self, run: Run) -> None:
            if run.state.step == 13:
                run.stop("enough")

    found = [
        fit(
            new_sae(),
            source(),
            config(log_every=100, validate_every=100),
            validation=HELD_OUT,
            callbacks=[Enough()],
            checkpoint_dir=tmp_path,
            resume=True,
        )
        for _ in range(2)
    ]
    assert [r.stopped for r in found] == ["enough"] * 2
    assert [[record["step"] for record in r.history] for r in found] == [[13]] * 2
    assert [[record["step"] for record in r.validations] for r in found] == [[13]] * 2


def test_early_stopping_lets_a_run_go_on_that_gets_better() -> None:
    result = fit(
        new_sae(), source(), config(), callbacks=[EarlyStoppingCallback(2, "train/loss", min_delta=0)]
    )
    assert (result.state.step, result.stopped) == (60, "")
    with pytest.raises(ValueError, match="val_loss must be measured but the run has no validation data"):
        fit(new_sae(), source(), config(), callbacks=[EarlyStoppingCallback(2)])
    with pytest.raises(ValueError, match=r"metric must be one of \['dead_fraction'.* but got 'luck'"):
        fit(new_sae(), source(), config(), callbacks=[EarlyStoppingCallback(2, "luck")])


def test_the_best_are_kept(tmp_path: Path) -> None:
    """Scores of a user's own validation: the third and fifth are best."""
    scores = iter([5.0, 4.0, 1.0, 3.0, 2.0, 9.0])

    class Score(Callback):
        def on_validation(self, run: Run, record: dict) -> None:
            record["val_mine"] = next(scores)

    watcher = CheckpointCallback(10, keep_best=2, metric="val_mine", directory=tmp_path / "best")
    settings = config(validate_every=10)
    exported = {}

    class Export(Callback):
        def on_step(self, run: Run) -> None:
            if run.state.step == 30:
                exported["sae"] = run.export()

    fit(new_sae(), source(), settings, callbacks=[Score(), watcher, Export()], validation=HELD_OUT)
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["step_00000030", "step_00000050"]
    assert watcher.best == tmp_path / "best" / "step_00000030"
    assert_same_bits(weights(load(watcher.best)), weights(exported["sae"]))


def test_the_best_of_what_files_do_not_hold_keeps_its_weights(tmp_path: Path) -> None:
    sae = HierarchicalSAE(16, 20, 28, coarse=ReLU(), fine=ReLU(), seed=0)
    watcher = CheckpointCallback(20, directory=tmp_path)
    fit(sae, source(), config(total_tokens=20 * 64), callbacks=[watcher])  # looks once, at the end
    again = HierarchicalSAE(16, 20, 28, coarse=ReLU(), fine=ReLU(), seed=1)
    again.load_weights(str(watcher.best / "weights.safetensors"))
    assert_same_bits(weights(again), weights(sae))


def test_keeping_the_best_survives_an_interruption(tmp_path: Path) -> None:
    def run(place: str, *more: Any, resume: bool = False) -> CheckpointCallback:
        watcher = CheckpointCallback(5, keep_best=2)
        fit(
            new_sae(),
            source(),
            config(log_every=5),
            callbacks=[watcher, *more],
            checkpoint_dir=tmp_path / place,
            resume=resume,
        )
        return watcher

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", StopAt(33))
    resumed = run("cut", resume=True)
    assert resumed.kept == whole.kept
    assert resumed.best is not None
    assert resumed.best.parent == tmp_path / "cut" / "best"
    assert sorted(p.name for p in resumed.best.parent.iterdir()) == sorted(n for _, n in whole.kept)
    with pytest.raises(ValueError, match="directory must be given where the run has no checkpoint_dir"):
        fit(new_sae(), source(), config(), callbacks=[CheckpointCallback()])


def test_metrics_by_their_names() -> None:
    record = {"loss": 1.0, "fvu": 0.5, "lr": 1e-3, "l1": 2.0}
    names = ("loss", "train/loss", "recon_loss", "learning_rate", "l1_loss", "luck")
    assert [metric_of(record, n) for n in names] == [1.0, 1.0, 0.5, 1e-3, 2.0, None]
    assert metric_of({"val_recon": 3.0}, "val_recon") == metric_of({"val_mse": 3.0}, "val/recon") == 3.0
    assert tracked_names({"step": 3, "tokens": 64} | record) == {
        "train/tokens": 64,
        "train/loss": 1.0,
        "train/recon_loss": 0.5,
        "train/fvu": 0.5,
        "train/learning_rate": 1e-3,
        "train/l1_loss": 2.0,
    }
    assert tracked_names(
        {"step": 3, "tokens": 64, "val_loss": 1.0, "val_l0": 4.0, "val_dead_fraction": 0.0}
    ) == {
        "val/loss": 1.0,
        "val/l0": 4.0,
        "val/dead_fraction": 0.0,
    }


# ---- tracking ----------------------------------------------------------------------------------------------

NAMES = {
    "train/loss",
    "train/recon_loss",
    "train/l0",
    "train/dead_fraction",
    "train/learning_rate",
    "val/loss",
    "val/l0",
    "val/dead_fraction",
}


def interrupted_and_resumed(make: Any, folder: Path) -> None:
    """A run that is cut at step 33 and goes on from the checkpoint of step 20."""
    options: dict[str, Any] = {"checkpoint_dir": folder, "validation": HELD_OUT}
    settings = config(validate_every=20)
    with pytest.raises(KeyboardInterrupt):
        fit(new_sae(), source(), settings, callbacks=[make(), StopAt(33)], **options)
    shutil.rmtree(folder / "step_00000033")  # as after a kill
    fit(new_sae(), source(), settings, callbacks=[make()], resume=True, **options)


def test_tracking_in_plain_files(tmp_path: Path) -> None:
    interrupted_and_resumed(
        lambda: TrackingCallback(LocalTracker(tmp_path / "log"), "my run"), tmp_path / "c"
    )
    described = json.loads((tmp_path / "log" / "my_run" / "run.json").read_text())
    assert described["name"] == "my run"
    assert described["config"]["train"]["batch_size"] == 64
    assert described["config"]["rule"] == {"k": 4}
    records = read_metrics(tmp_path / "log" / "my_run")
    assert [r["step"] for r in records if "train/loss" in r] == [10, 20, 30, 40, 50, 60]  # each once
    assert [r["step"] for r in records if "val/loss" in r] == [20, 40, 60]
    assert set().union(*records) >= NAMES
    with open(tmp_path / "log" / "my_run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 70, "train/lo')  # a crash
    assert read_metrics(tmp_path / "log" / "my_run") == records


def test_a_library_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=r"wandb must be installed but is not: pip install 'mlxsae\[wandb\]'"
    ):
        WandbCallback("x")
    with pytest.raises(ImportError, match=r"pip install 'mlxsae\[tensorboard\]'"):
        TensorBoardCallback("x")


def test_experiment_with_runs_metrics_figures_and_a_comparison(tmp_path: Path) -> None:
    backends = ["local"]
    try:
        import tensorboardX  # noqa: F401

        backends.append("tensorboard")
    except ImportError:
        pass
    experiment = Experiment("k sweep", track_with=backends, config={"layer": 3}, directory=tmp_path)
    for k in (1, 4, 8):
        with experiment.start_run(f"k {k}", {"k": k}):
            sae = new_sae()
            sae.rule.k = k
            fit(sae, source(), config(), callbacks=[experiment.get_callback()], validation=HELD_OUT)
            experiment.log_metrics(evaluate(sae, [mx.array(HELD_OUT)]))
            experiment.log_figure("codes", "<b>codes</b>")
            experiment.log_figure("image", np.zeros((4, 5, 3), np.uint8))
    compared = experiment.compare_runs("recon_loss")
    assert [row["run"] for row in compared.rows] == ["k 8", "k 4", "k 1"]
    assert compared.best == "k 8"
    assert str(compared).splitlines()[0].split() == ["run", "best", "recon_loss", "at", "step", "last"]
    assert [row["run"] for row in experiment.compare_runs("l0", mode="max").rows] == ["k 8", "k 4", "k 1"]
    with pytest.raises(ValueError, match="mode must be min or max but got 'least'"):
        experiment.compare_runs("l0", mode="least")
    folder = tmp_path / "k_sweep" / "local" / "k_4"
    assert json.loads((folder / "run.json").read_text())["config"] == {"layer": 3, "k": 4}
    assert json.loads((folder / "training.json").read_text())["engine"] == "fused"
    assert sorted(p.name for p in (folder / "figures").iterdir()) == [
        "codes_00000060.html",
        "image_00000060.npy",
    ]
    assert read_metrics(folder)[-1]["explained_variance"] > 0
    # Another process sees the runs of this one.
    later = Experiment("k sweep", directory=tmp_path)
    assert [row["run"] for row in later.compare_runs("fvu").rows] == ["k 8", "k 4", "k 1"]
    with pytest.raises(ValueError, match=r"metric must be one of \[.*'train/loss'.*\] but got 'luck'"):
        later.compare_runs("luck")
    with pytest.raises(ValueError, match="start_run must come first"):
        later.log_metrics({"a": 1})
    with pytest.raises(ValueError, match=r"track_with must name some of .* but got \['mlflow'\]"):
        Experiment("x", track_with="mlflow")


def test_an_experiment_goes_on_where_training_does(tmp_path: Path) -> None:
    """Each call is a process of its own: what was logged up to the checkpoint stays, in files and in comparisons."""

    def study(*more: Any, backends: tuple[str, ...] = ("local",)) -> Experiment:
        experiment = Experiment("study", track_with=backends, directory=tmp_path)
        with experiment.start_run("a"):
            options: dict[str, Any] = {
                "checkpoint_dir": tmp_path / "c",
                "validation": HELD_OUT,
                "resume": True,
            }
            callbacks = [experiment.get_callback(), *more]
            fit(new_sae(), source(), config(validate_every=20), callbacks=callbacks, **options)
            experiment.log_metrics({"mine": 1.0})
        return experiment

    folder = tmp_path / "study" / "local" / "a"
    with pytest.raises(KeyboardInterrupt):
        study(StopAt(33))
    assert [r["step"] for r in read_metrics(folder)] == [10, 20, 20, 30]
    shutil.rmtree(tmp_path / "c" / "step_00000033")  # as after a kill
    whole = [10, 20, 20, 30, 40, 40, 50, 60, 60, 60]
    for backends in (("local",), ()):  # the second finds a finished run, and what its checkpoint knows
        experiment = study(backends=backends)
        assert [r["step"] for r in experiment.compare_runs("loss").rows[0]["records"]] == whole
    assert [r["step"] for r in read_metrics(folder)] == whole
    study()
    assert [r["step"] for r in read_metrics(folder)] == [*whole, 60]  # one more of its own, nothing less
    with Experiment("study", directory=tmp_path).start_run("a") as again:
        again.log_metrics({"mine": 2.0})
    assert read_metrics(folder) == [{"step": 0, "mine": 2.0}]  # without a checkpoint: anew


def test_an_experiment_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    experiment = Experiment("study", directory=tmp_path)
    with experiment.start_run("a/b"):
        experiment.log_metrics({"x": float("nan")})
        experiment.end_run()  # once is enough
    experiment.start_run("a_b")
    with pytest.raises(ValueError, match=r"'a_b' must have a folder of its own but .*a_b holds 'a/b'"):
        experiment.log_metrics({"x": 1})
    with pytest.raises(ValueError, match="x must be a number but got 'y'"):
        experiment.log_metrics({"x": "y"})
    with pytest.raises(
        ValueError, match=r"p must be a matplotlib figure, .* but got ndarray of float64 \(3,\)"
    ):
        experiment.log_figure("p", np.zeros(3))
    with pytest.raises(ValueError, match=r"metric must be one of \[\] but got 'x'; these have finite values"):
        experiment.compare_runs("x")


# ---- profiling ---------------------------------------------------------------------------------------------


def test_profile_accounts_for_the_time() -> None:
    class Slow(Callback):
        def on_step(self, run: Run) -> None:
            import time

            time.sleep(0.002)

    result = fit(new_sae(), source(), config(), profile=True, callbacks=[Slow()], validation=HELD_OUT)
    profile = result.profile
    assert profile is not None
    parts = {"data", "step", "log", "callbacks", "validation"}
    assert parts <= profile.keys()
    assert 0.12 < profile["callbacks"] < profile["total"]
    assert 0.5 * profile["total"] < sum(profile[p] for p in parts) <= profile["total"]
    assert profile["steps"] == 60
    assert profile["peak_bytes"] > 0
    assert profile["tokens_per_s"] == pytest.approx(60 * 64 / profile["total"])
    plain = fit(new_sae(), source(), config())
    assert plain.profile is None
    assert_same_bits(weights(plain.sae), weights(result.sae))
