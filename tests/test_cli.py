"""The command line end to end, on a real small model and little text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxsae
from mlxsae.cli import main
from mlxsae.io import native
from mlxsae.lm.text import in_heldout

COMMAND = [sys.executable, "-m", "mlxsae.cli"]


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred real stories."""
    texts = json.loads((shared / "data" / "text" / "tinystories_val.json").read_text())[:100]
    path = tmp_path_factory.mktemp("text") / "stories.json"
    path.write_text(json.dumps(texts))
    return path


@pytest.fixture(scope="module")
def model(shared: Path) -> str:
    return str(shared / "data" / "babyllama105")


def arguments(model: str, dataset: object, out: object, **options: object) -> list[str]:
    chosen: dict[str, object] = {
        "model": model,
        "layer": 2,
        "component": "resid",
        "dataset": dataset,
        "k": 8,
        "expansion-factor": 4,
        "max-tokens": 8_000,
        "heldout-tokens": 1_500,
        "batch-size": 256,
        "context-size": 64,
        "buffer-tokens": 4_096,
        "out": out,
    }
    chosen |= {name.replace("_", "-"): value for name, value in options.items()}
    flat = []
    for name, value in chosen.items():
        if value is True:
            flat.append(f"--{name}")
        elif value is not None:
            flat += [f"--{name}", str(value)]
    return ["train", *flat]


@pytest.fixture(scope="module")
def trained(model: str, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(arguments(model, stories, out, quiet=True)) == 0
    return out


def run_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def test_train_leaves_the_four_files(trained: Path, stories: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "metadata.json", "run.json"}
    run = run_of(trained)
    assert run["status"] == "done"
    assert run["argv"][0] == "train"
    assert run["options"]["k"] == 8
    assert run["config"]["sae"]["d_sae"] == 4 * 128
    assert run["config"]["hook_name"] == "blocks.2.hook_resid_post"
    assert run["dataset"]["bytes"] == stories.stat().st_size
    assert len(run["dataset"]["sha256"]) == len(run["model"]["config_sha256"]) == 64
    assert {"mlxsae", "mlx", "mlx-lm", "numpy", "python"} <= run["versions"].keys()
    assert run["device"]["threads"] >= 1
    results = run["results"]
    assert results["train_tokens"] == 8_000
    assert results["n_tokens"] == 1_500
    assert 0 < results["fvu"] < 1
    assert results["l0"] <= 8
    assert results["ce_clean"] < results["ce_sae"] < results["ce_mean"]
    assert 0 < results["loss_recovered_mean"] < 1
    assert results["tokens_per_s"] > 0
    sae = native.load(trained)
    assert sae.metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert sae.metadata["evaluation"]["fvu"] == results["fvu"]


def test_the_same_command_gives_the_same_bits(
    trained: Path, model: str, stories: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert main(arguments(model, stories, again, quiet=True)) == 0
    weights = [mx.load(str(out / "sae_weights.safetensors")) for out in (trained, again)]
    for name, value in weights[0].items():
        assert mx.array_equal(value, weights[1][name]), name
    other = tmp_path / "other"
    assert main(arguments(model, stories, other, seed=1, quiet=True)) == 0
    assert not mx.array_equal(mx.load(str(other / "sae_weights.safetensors"))["W_enc"], weights[0]["W_enc"])


def test_eval_repeats_the_metrics_of_the_training(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = run_of(trained)["results"]
    for name in ("fvu", "l0", "dead_fraction", "ce_clean", "ce_sae", "loss_recovered_mean", "n_tokens"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6), name


def test_eval_on_another_dataset_and_as_a_table(trained: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "other.txt"
    text.write_text("The dog saw a big red ball. It was happy.\n\nA cat sat on the mat and slept all day.\n")
    assert main(["eval", str(trained), "--dataset", str(text)]) == 0
    out = capsys.readouterr().out
    for word in (
        "L0",
        "FVU",
        "explained variance",
        "dead",
        "zero ablation",
        "mean ablation",
        "cross entropy",
    ):
        assert word in out


def test_eval_knows_the_text_of_the_training_by_what_it_holds(
    trained: Path, stories: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """However it is spelt, and a copy too; of another text under the same name all is used."""
    wanted = run_of(trained)["results"]["fvu"]
    monkeypatch.chdir(stories.parent)
    copy = shutil.copy(stories, tmp_path / "copy.json")
    for spelling in (stories.name, f"./{stories.name}", copy):
        assert main(["eval", str(trained), "--dataset", str(spelling), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["fvu"] == pytest.approx(wanted, rel=1e-6), spelling
    monkeypatch.chdir(tmp_path)
    texts = json.loads(stories.read_text())
    Path(stories.name).write_text(json.dumps([t for t in texts if not in_heldout(t)]))
    assert main(["eval", str(trained), "--dataset", stories.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tokens"] == 1_500


def test_eval_of_a_folder_that_says_nothing_of_its_origin(
    trained: Path, model: str, tmp_path: Path, capsys
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(trained / name, bare)
    config = json.loads((bare / "cfg.json").read_text())
    config["metadata"] = {}
    (bare / "cfg.json").write_text(json.dumps(config))
    assert main(["eval", str(bare)]) == 1
    assert "--model must be given" in capsys.readouterr().err


def test_run_json_comes_before_any_other_work(model: str, stories: Path, tmp_path: Path, monkeypatch) -> None:
    """Where loading the model dies as a power cut would have it, run.json is there and says what was running."""
    from mlxsae.cli import train_command

    seen = {}

    class PowerCut(BaseException):
        pass

    def die(name: str) -> None:
        seen.update(run_of(tmp_path / "run"))
        seen["files"] = [path.name for path in (tmp_path / "run").iterdir()]
        raise PowerCut

    monkeypatch.setattr(train_command.lm_room, "load", die)
    with pytest.raises(PowerCut):
        main(arguments(model, stories, tmp_path / "run"))
    assert seen["files"] == ["run.json"]
    assert seen["status"] == "running"
    assert seen["options"]["model"] == model
    assert run_of(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("rule", ["relu", "gated"])
def test_k_is_the_wanted_l0_of_a_penalty(rule: str, model: str, stories: Path, tmp_path: Path) -> None:
    assert main(arguments(model, stories, tmp_path, rule=rule, max_tokens=30_000)) == 0
    assert run_of(tmp_path)["results"]["l0"] == pytest.approx(8, rel=0.25)  # a short run: 118 steps


BAD = {
    "missing model": ({"model": "no/such/model/here"}, 1, "model"),
    "layer out of range": ({"layer": 5}, 1, "layer"),
    "negative layer": ({"layer": -1}, 2, "at least 0"),
    "a component of no width": ({"component": "attn_pattern"}, 1, "must have one width"),
    "target of a rule with k": ({"target_l0": 8}, 1, "target_l0 must come with a term"),
    "two wanted L0s": (
        {"target_l0": 4, "rule": "relu"},
        2,
        "--k is the L0 to reach for relu and must agree with",
    ),
    "two losses": ({"target_l0": 8, "rule": "relu", "end_to_end": "kl"}, 1, "must be None where end_to_end"),
    "unknown loss": ({"end_to_end": "mse"}, 2, "must be kl or ce"),
    "unknown component": ({"component": "brain"}, 2, "component must be one of"),
    "missing dataset": ({"dataset": "nowhere.json"}, 1, "nowhere.json"),
    "k of zero": ({"k": 0}, 2, "at least 1"),
    "k over d_sae": ({"k": 513}, 1, "k must be in (0, d_sae]"),
    "unknown rule": ({"rule": "magic"}, 2, "must be one of batchtopk"),
    "unknown precision": ({"precision": "fp8"}, 2, "must be one of float32, certified, tf32, bfloat16"),
    "unknown moments": ({"moments": "fp8"}, 2, "invalid choice: 'fp8'"),
    "resume with options": ({"resume": "somewhere"}, 2, "--resume takes its options from the run"),
    "unknown preset": ({"aux": "mine"}, 2, "invalid choice: 'mine'"),
    "unknown optimizer": ({"optimizer": "magic"}, 2, "must be one of adadelta"),
    "no config": ({"config": "nowhere.json"}, 1, "nowhere.json"),
    "all held out": ({"heldout_fraction": 1.5}, 2, "below 1"),
    "a seed too large": ({"seed": 2**64}, 2, "--seed: must be at most 18446744073709551615"),
    "an empty folder": ({"out": ""}, 2, "--out: must be a path but is empty"),
    "an empty dataset": ({"dataset": ""}, 1, "source must be a file, a folder or a name but is empty"),
    "an empty model": ({"model": ""}, 1, "must be a folder, 'owner/name' on the hub, or 'tiny' but got ''"),
    "no number": ({"learning_rate": "fast"}, 2, "must be a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, model: str, stories: Path, tmp_path: Path, capsys) -> None:
    options, code, said = BAD[case]
    options = dict(options)
    chosen = (
        options.pop("model", model),
        options.pop("dataset", stories),
        options.pop("out", tmp_path / "run"),
    )
    assert main(arguments(*chosen, **options)) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    if code == 1:
        last = err.strip().splitlines()[-1]
        assert last.startswith("mlxsae: error: ")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"data": null}', "data must be an object but got None"),
        ('{"train": 5}', "train must be an object but got 5"),
        ('{"train": {"optimizer": null}, "learning_rate": 1e-3}', "optimizer must be an object but got None"),
    ],
)
def test_a_config_that_options_cannot_overrule(
    config: str, said: str, model: str, stories: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "config.json"
    path.write_text(config)
    options = {"config": path, "optimizer": "adamw", "heldout_fraction": 0.2}
    assert main(arguments(model, stories, tmp_path / "run", **options)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_home_and_the_working_directory(tmp_path: Path, capsys, monkeypatch) -> None:
    """The shell leaves the ``~`` of ``--out=~/run``."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["demo", "--tokens", "1000", "--heldout-tokens", "1000", "--quiet", "--out=~/demo"]) == 0
    assert (tmp_path / "home" / "demo" / "cfg.json").exists()
    assert list(Path.cwd().iterdir()) == []
    assert main(["info", "~/demo"]) == 0
    capsys.readouterr()
    assert main(["demo", "--port", "70000"]) == 2  # before the training and not after
    assert "--port: must be at most 65535" in capsys.readouterr().err


def test_one_run_a_folder(model: str, stories: Path, tmp_path: Path, capsys) -> None:
    from mlxsae.cli.run_file import alone

    out = tmp_path / "run"
    with alone("train", out):
        for command in (arguments(model, stories, out), ["demo", "--out", str(out)]):
            assert main(command) == 1
            assert "must have one run at a time but another one is at work" in capsys.readouterr().err
        assert list(out.iterdir()) == []


@pytest.mark.parametrize("content", ["[]", '["", "  "]'])
def test_empty_dataset(content: str, model: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "empty.json"
    path.write_text(content)
    assert main(arguments(model, path, tmp_path / "run")) == 1
    assert "at least one document" in capsys.readouterr().err
    run = run_of(tmp_path / "run")
    assert run["status"] == "failed"
    assert "at least one document" in run["error"]


def test_eval_looks_at_as_many_tokens_as_the_training(tmp_path: Path, capsys) -> None:
    from mlxsae import lm

    path, out = tmp_path / "facts.json", tmp_path / "run"
    path.write_text(json.dumps(lm.tiny.texts(100, seed=3)))
    assert main(arguments("tiny", path, out, max_tokens=500, heldout_tokens=100, json=True)) == 0
    wanted = json.loads(capsys.readouterr().out)
    for more, tokens in (([], 100), (["--heldout-tokens", "50"], 50)):
        assert main(["eval", str(out), "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["n_tokens"] == tokens
        assert (found["fvu"] == wanted["fvu"]) == (tokens == 100)


def test_no_text_is_found_before_training(tmp_path: Path, capsys) -> None:
    """All documents in one part of the split, or none but unknown tokens: an error at once, not a walk without end."""
    path = tmp_path / "few.json"
    stories = [f"Clara found the lamp. {word} has a green ring." for word in "abcdefghijklmnop"]
    for texts, said in (
        ([t for t in stories if not in_heldout(t, 0.1)], "in split 'heldout'"),
        (["\u2603" * i for i in range(1, 40)], "token that is not special"),
    ):
        path.write_text(json.dumps(texts))
        assert main(arguments("tiny", path, tmp_path / "run")) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run" / "checkpoints").exists()
        shutil.rmtree(tmp_path / "run")


def test_out_that_cannot_be_written(model: str, stories: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(arguments(model, stories, tmp_path / "file" / "run")) == 1
    assert "--out must be a folder that can be written" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "file" / "run")]) == 1
    assert "[demo] --out must be a folder that can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_eval_warns_where_nobody_knows_what_was_held_out(trained: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(trained, tmp_path / "other")
    (folder / "run.json").unlink()
    for directory, warned in ((trained, False), (folder, True)):
        assert main(["eval", str(directory), "--json"]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 1
        assert ("does not say what was held out of" in err) == warned
    assert main(["eval", str(folder), "--json", "--dataset", run_of(trained)["dataset"]["path"]]) == 0
    assert capsys.readouterr().err == ""


def test_eval_of_longer_texts_than_the_model_reads(trained: Path, capsys) -> None:
    assert main(["eval", str(trained), "--context-size", "100000"]) == 1
    assert "context_size must be at most the model's 256 but got 100000" in capsys.readouterr().err


def test_eval_of_damaged_weights(trained: Path, tmp_path: Path, capsys) -> None:
    broken = shutil.copytree(trained, tmp_path / "broken")
    weights = broken / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["eval", str(broken)]) == 1
    assert "sae_weights.safetensors" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nothing")]) == 1
    assert "must exist" in capsys.readouterr().err
    (broken / "run.json").write_text("{")
    shutil.copy(trained / "sae_weights.safetensors", broken)
    assert main(["eval", str(broken)]) == 1
    assert "run.json must be JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": None}, "its status is None"),
        ({"results": None}, "its results is None"),
        ({"options": []}, "its options is []"),
        ({"dataset": None}, "its dataset is None"),
        ({"model": "x"}, "its model is 'x'"),
        ({"model": {"path": "x"}}, "its model is {'path': 'x'}"),
    ],
)
def test_a_damaged_run_file(changes: dict, said: str, trained: Path, tmp_path: Path, capsys) -> None:
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "run.json").write_text(json.dumps(run_of(trained) | changes))
    for command in (["train", "--resume", str(broken)], ["eval", str(broken)]):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert "run.json must be whole but " + said in err


def test_metadata_that_says_other_things(trained: Path, tmp_path: Path, capsys) -> None:
    """SAE.metadata is the user's own: no command fails for what it holds, and none goes by it."""
    folder = shutil.copytree(trained, tmp_path / "other")
    (folder / "run.json").unlink()
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["metadata"] |= {
        "evaluation": 5,
        "training": None,
        "model_name": [1],
        "context_size": "x",
        "hook_name": 7,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    assert main(["info", str(folder)]) == 0
    assert main(["eval", str(folder)]) == 1
    assert "--model must be given" in capsys.readouterr().err


def test_resuming_with_another_thing_where_a_name_was(tmp_path: Path, capsys, monkeypatch) -> None:
    """ "tiny" named the bundled model; now a folder of that name lies there."""
    from mlxsae import lm

    path, out = tmp_path / "facts.json", tmp_path / "run"
    path.write_text(json.dumps(lm.tiny.texts(100, seed=3)))
    assert main(arguments("tiny", path, out, max_tokens=500, heldout_tokens=100)) == 0
    (out / "run.json").write_text(json.dumps(run_of(out) | {"status": "interrupted"}))
    shutil.copytree(lm.tiny.folder(), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", str(out)]) == 1
    assert "--model must be as when the run began but tiny is gone or has changed" in capsys.readouterr().err


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(model: str, stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*COMMAND, *arguments(model, stories, out, max_tokens=5_000_000, checkpoint_every=1_000_000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stderr is not None
    for line in process.stderr:
        if "tok/s" in line:  # training is under way
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, rest
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name in rest
    assert "--resume" in rest
    assert "Traceback" not in rest
    run = run_of(out)
    assert run["status"] == "interrupted"
    assert run["checkpoint"] == str(checkpoint)


def assert_same_files(a: Path, b: Path) -> None:
    """Weights and what describes them are the same to the byte; times of day and paths are elsewhere."""
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_resumed_run_equals_the_uninterrupted_one(
    trained: Path, model: str, stories: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 17)
        assert main(arguments(model, stories, out, quiet=True)) == 130
    err = capsys.readouterr().err
    assert "step_00000017" in err
    assert f"mlxsae train --resume {out}" in err

    assert main(arguments(model, stories, out, quiet=True)) == 1  # an unfinished run is not dropped unasked
    assert "unfinished run" in capsys.readouterr().err
    assert (out / "checkpoints" / "step_00000017").is_dir()
    monkeypatch.chdir(tmp_path)  # wherever one stands
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    assert_same_files(trained, out)
    assert not (out / "checkpoints").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let runs of the command line end after ``step`` as if by Ctrl-C."""
    from mlxsae.cli import train_command
    from mlxsae.train import Callback, Run

    class Stop(Callback):
        def on_step(self, run: Run) -> None:
            if run.state.step == step:
                raise KeyboardInterrupt

    fit = train_command.fit_many
    monkeypatch.setattr(
        train_command,
        "fit_many",
        lambda jobs, *a, **o: fit([replace(job, callbacks=[Stop()]) for job in jobs], *a, **o),
    )


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_end_to_end_and_resumed(
    loss: str, model: str, stories: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Two layers at once, each judged through its own hook point."""
    options: dict[str, object] = {
        "layer": "1,2",
        "max-tokens": 1_500,
        "heldout-tokens": 500,
        "end-to-end": loss,
    }
    options |= {"quiet": True, "checkpoint-every": 2}
    assert main(arguments(model, stories, tmp_path / "whole", **options)) == 0
    assert run_of(tmp_path / "whole")["config"]["sae"]["train"]["loss"]["end_to_end"] == {
        "ce": "cross_entropy"
    }.get(loss, loss)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(arguments(model, stories, tmp_path / "run", **options)) == 130
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    alone = options | {"layer": 2}
    assert main(arguments(model, stories, tmp_path / "alone", **alone)) == 0
    name = "blocks.2.hook_resid_post"
    for layer in (1, 2):
        hook = f"blocks.{layer}.hook_resid_post"
        assert_same_files(tmp_path / "whole" / hook, tmp_path / "run" / hook)
    a, b = (
        mx.load(str(p / "sae_weights.safetensors")) for p in (tmp_path / "alone", tmp_path / "whole" / name)
    )
    assert all(mx.array_equal(a[key], b[key]) for key in a)
    plain = options | {"layer": 2, "end-to-end": None}
    assert main(arguments(model, stories, tmp_path / "plain", **plain)) == 0
    c = mx.load(str(tmp_path / "plain" / "sae_weights.safetensors"))
    assert not mx.array_equal(a["W_enc"], c["W_enc"])
    capsys.readouterr()


def test_resuming_a_finished_run_changes_nothing(trained: Path, capsys) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in trained.iterdir()}
    assert main(["train", "--resume", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == run_of(trained)["results"]
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in trained.iterdir()} == before


def test_resuming_after_a_kill_before_the_first_checkpoint(
    trained: Path, model: str, stories: Path, tmp_path: Path, capsys
) -> None:
    """SIGKILL as soon as run.json is there: the model is not even loaded."""
    out, text = tmp_path / "run", tmp_path / "stories.json"
    shutil.copy(stories, text)
    process = subprocess.Popen([*COMMAND, *arguments(model, stories, out)], stderr=subprocess.DEVNULL)
    while not (out / "run.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run_of(out)["status"] == "running"
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    assert_same_files(trained, out)
    capsys.readouterr()
    # What cannot be resumed is said.
    assert main(["train", "--resume", str(tmp_path / "none")]) == 1
    assert "holds none" in capsys.readouterr().err
    run = run_of(out) | {"status": "running", "dataset": {"name": "x", "path": str(text), "sha256": "0"}}
    (out / "run.json").write_text(json.dumps(run))
    assert main(["train", "--resume", str(out)]) == 1
    assert "--dataset must be as when the run began" in capsys.readouterr().err


def test_config_file(model: str, stories: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.json"
    loss = {"reconstruction": "mse", "auxk": "openai"}
    settings = {
        "k": 3,
        "d_sae": 300,
        "train": {"loss": loss, "batch_size": 128, "log_every": 2},
        "data": {"context_size": 48, "validation_split": 0.2},
        "tracking": {"local": str(tmp_path / "log")},
    }
    path.write_text(json.dumps(settings))
    out = tmp_path / "run"
    wanted = arguments(model, stories, out, quiet=True, config=path, max_tokens=1024, aux="sparsify")
    wanted[wanted.index("--context-size") : wanted.index("--context-size") + 2] = []
    assert main(wanted) == 0
    got = run_of(out)["config"]["sae"]
    assert (got["d_sae"], got["k"]) == (300, 8)  # the option overrules the file
    assert got["train"]["loss"]["reconstruction"] == "mse"
    assert got["train"]["loss"]["auxk"] == "sparsify"
    assert run_of(out)["options"]["config"]["k"] == 3
    assert native.load(out).d_sae == 300
    assert native.load(out).metadata["context_size"] == 48
    assert got["data"] | {"validation_split": 0.2, "validation_tokens": 1500} == got["data"]
    assert "train/loss" in (tmp_path / "log" / "metrics.jsonl").read_text()
    told = json.loads((tmp_path / "log" / "run.json").read_text())["config"]["metadata"]
    assert (told["model_name"], told["hook_name"]) == (str(model), native.load(out).metadata["hook_name"])
    for text, said in (
        ("{", "--config must be JSON"),
        ("[]", "a JSON object"),
        ('{"x": 1}', "known but got x"),
        (
            '{"data": {"hook_point": "blocks.1.hook_mlp_out"}}',
            "data.hook_point must not be in --config but is",
        ),
        ('{"learning_rate": "fast"}', "learning_rate must be float but got 'fast'"),
    ):
        path.write_text(text)
        assert main(arguments(model, stories, tmp_path / "other", config=path)) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_config_file_of_flat_names_and_relative_places(
    model: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    settings = {
        "learning_rate": 2e-3,
        "k_aux": 7,
        "train": {"loss": {"dead_after": 99}},
        "tracking": {"local": "log"},
    }
    path.write_text(json.dumps(settings))
    out = tmp_path / "run"
    assert main(arguments(model, stories, out, quiet=True, config=path, max_tokens=512)) == 0
    train = run_of(out)["config"]["sae"]["train"]
    assert (train["optimizer"]["learning_rate"], train["loss"]["k_aux"], train["loss"]["dead_after"]) == (
        2e-3,
        7,
        99,
    )
    assert run_of(out)["options"]["config"]["tracking"]["local"] == str(tmp_path / "log")
    too_long = arguments(model, stories, tmp_path / "other", quiet=True)
    too_long[too_long.index("--context-size") + 1] = "100000"
    assert main(too_long) == 1
    assert "context_size must be at most the model's" in capsys.readouterr().err


def test_json_output_is_one_line(model: str, stories: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(model, stories, tmp_path / "a", quiet=True, json=True, max_tokens=512)) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert {"fvu", "l0", "loss_recovered_zero"} <= json.loads(captured.out).keys()
    assert captured.err == ""
    assert main([*arguments(model, stories, tmp_path / "b", max_tokens=512), "--no-aux"]) == 0
    assert "tok/s" in capsys.readouterr().err
    assert run_of(tmp_path / "b")["config"]["sae"]["train"]["loss"]["auxk"] is None


def test_bench_step(capsys) -> None:
    size = ["--n", "64", "--d-in", "32", "--d-sae", "256", "--k", "4", "--steps", "3"]
    assert main(["bench", "step", *size, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    facts = json.loads(out)
    assert 0 < facts["min_s"] <= facts["median_s"]
    assert facts["tokens_per_s"] == pytest.approx(64 / facts["median_s"])
    assert facts["peak_rss_bytes"] > 2**20
    assert facts["steps"] == 3
    assert facts["options"]["k"] == 4
    assert {"versions", "device", "engine"} <= facts.keys()
    assert main(["bench", "step", *size, "--aux"]) == 0
    assert "median" in capsys.readouterr().out
    assert main(["bench", "step", *size, "--precision", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["precision"] == "bfloat16"
    assert main(["bench", "step", *size, "--precision", "fp8"]) == 2
    assert "must be one of float32" in capsys.readouterr().err
    assert main(["bench", "step", "--d-sae", "8", "--k", "9", "--n", "4", "--d-in", "4"]) == 1
    assert "k must be in (0, d_sae]" in capsys.readouterr().err
    assert main(["bench"]) == 2


def test_bench_with_aux_really_has_dead_latents() -> None:
    from mlxsae.bench import time_step

    measured = time_step(n=16, d_in=16, d_sae=512, k=2, aux=True, steps=3)
    assert measured["dead_fraction"] > 0.5  # at most 32 of 512 fire in a batch


@pytest.mark.parametrize("rule", sorted(mlxsae.sae.RULES))
def test_bench_of_every_rule(rule: str, capsys) -> None:
    size = [*("--n", "32", "--d-in", "16", "--d-sae", "64", "--k", "4", "--steps", "1")]
    assert main(["bench", "step", *size, "--rule", rule, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_bench_without_steps() -> None:
    from mlxsae.bench import time_step

    with pytest.raises(ValueError, match=r"\[time_step\] steps must be positive but got 0"):
        time_step(n=16, d_in=16, d_sae=32, k=2, steps=0)


def test_info(capsys) -> None:
    import mlxsae

    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("mlx-lm", "MLX device", "threads", "BLAS", *mlxsae.backends()):
        assert word in out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"] == mlxsae.backends()
    assert "reason" in facts["blas"]


def test_info_of_a_saved_sae(trained: Path, tmp_path: Path, capsys) -> None:
    assert main(["info", str(trained)]) == 0
    out = capsys.readouterr().out
    for word in ("topk", "TopK(k=8)", "512", "blocks.2.hook_resid_post", "fvu"):
        assert word in out
    clt = mlxsae.sae.CrossLayerTranscoder(6, 3, 20, rule=mlxsae.sae.JumpReLU(2), seed=0)
    native.save(clt, tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "CrossLayerTranscoder"
    assert (found["n_layers"], found["d_sae"], found["d_in"]) == (3, 60, 18)
    (tmp_path / "W_dec_2.safetensors").unlink()
    assert main(["info", str(tmp_path)]) == 1
    assert "W_dec_2.safetensors must exist" in capsys.readouterr().err


def test_info_of_a_folder_of_several_names_them(tmp_path: Path, capsys) -> None:
    for name in ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"):
        native.save(mlxsae.SAE(4, 8, k=2), tmp_path / name)
    assert main(["info", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} must be the folder of one SAE but holds those in" in said
    assert f"{tmp_path / 'blocks.0.hook_mlp_out'}, {tmp_path / 'blocks.1.hook_mlp_out'}." in said


def test_usage(capsys) -> None:
    import mlxsae

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mlxsae.__version__
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert main(["train"]) == 2
    assert "--model" in capsys.readouterr().err
    for command in ("demo", "train", "eval", "info", "bench"):
        assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.count("usage: mlxsae") == 5
    assert main(["bench", "step", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "relu, sigmoid_gated, topk, topk_jumprelu (topk)" in shown
    assert "float32, certified, tf32, bfloat16 (float32)" in shown


def test_help_does_not_load_mlx_lm() -> None:
    code = "import sys; from mlxsae.cli import main; main(['train', '--help']); assert 'mlx_lm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_closed_pipe_is_no_traceback() -> None:
    process = subprocess.Popen(
        [*COMMAND, "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    process.wait(timeout=60)
    assert "Traceback" not in err


def test_demo_at_a_small_size(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    start = time.process_time()
    options = ["--tokens", "40000", "--heldout-tokens", "8000", "--seed", "3", "--quiet"]
    assert main(["demo", "--out", str(tmp_path), *options]) == 0
    assert time.process_time() - start < 120
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert captured.out.count("bits per token") == 10
    assert "«" in captured.out
    assert "before:" in captured.out or "No feature was found" in captured.out
    assert (tmp_path / "report.html").resolve().as_uri() in captured.out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "metadata.json", "run.json", "report.html"}
    run = run_of(tmp_path)
    assert run["status"] == "done"
    assert run["results"]["fvu"] < 0.3
    assert run["results"]["loss_recovered_mean"] > 0.8
    page = (tmp_path / "report.html").read_text()
    assert f"{run['results']['fvu']:.4f}" in page
    assert "http://" not in page
    assert "https://" not in page
    sae = native.load(tmp_path)
    assert sae.d_sae >= 8 * sae.d_in
    assert np.isfinite(np.array(sae.W_dec)).all()
