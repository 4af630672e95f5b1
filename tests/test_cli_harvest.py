"""``mlxsae harvest`` and training on what it stores, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from lm_toys import write_folder
from mlxsae import lm
from mlxsae.cli import main
from mlxsae.data import ActivationDataset
from mlxsae.io import load_saes, native


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "texts.json"
    animals = ("dog", "cat", "Fox", "hen", "old ox", "zebra")
    texts = [
        f"The {a} met {'a big '[: i % 7]}{b}. Then it ran home {i * 'x'}."
        for i, a in enumerate(animals)
        for b in animals
    ]
    path.write_text(json.dumps([f"{t} {t[::-1]}" for t in texts]))
    return path


def command(model: Path, text: Path, out: Path, **more: Any) -> list[str]:
    options: dict[str, Any] = {
        "model": model,
        "layer": [1, 2],
        "component": ["resid", "mlp_in", "mlp_out"],
        "dataset": text,
        "context-size": 32,
        "max-tokens": 1500,
        "out": out,
        "quiet": True,
    } | {name.replace("_", "-"): value for name, value in more.items()}
    words = ["harvest"]
    for name, value in options.items():
        if value is None or value is False:
            continue
        words += [
            f"--{name}",
            *([] if value is True else map(str, value if isinstance(value, list) else [value])),
        ]
    return words


@pytest.fixture(scope="module")
def stored(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored") / "set"
    assert main(command(model, text, out)) == 0
    return out


def training(stored: Path, out: Path, *more: str) -> list[str]:
    options = ["--k", "4", "--expansion-factor", "4", "--max-tokens", "6000", "--batch-size", "200"]
    return ["train", "--activations", str(stored), "--out", str(out), "--quiet", *options, *more]


def test_several_layers_and_components_from_one_pass(stored: Path, model: Path, text: Path) -> None:
    made = ActivationDataset.open(stored)
    sites = ("hook_resid_post", "mlp.hook_in", "hook_mlp_out")
    assert made.hook_points == [f"blocks.{layer}.{site}" for layer in (1, 2) for site in sites]
    assert len(made) == 1500
    assert {p.name for p in stored.iterdir()} == {"dataset.json", "shard_00000.safetensors"}
    toy = lm.load(model)
    texts = json.loads(text.read_text())
    kept = [t for t in texts if not lm.in_heldout(t)]
    assert 0 < len(kept) < len(texts)
    tokens = np.array(
        next(made.batches(10**6, hook_points=["blocks.1.hook_resid_post"], tokens=True))["tokens"]
    )
    possible = [i for t in kept for i in toy.encode(t, bos=False)]
    assert not np.isin(tokens, sorted(toy.special_ids)).any()
    counts = np.bincount(tokens, minlength=61)
    assert (counts <= np.bincount(possible, minlength=61)).all()


def test_run_again_it_goes_on(model: Path, text: Path, tmp_path: Path, stored: Path, capsys) -> None:
    out = tmp_path / "set"
    assert main(command(model, text, out, max_tokens=700, json=True)) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["tokens"], first["new_tokens"], first["verified"]) == (700, 700, False)
    assert main(command(model, text, out, json=True, verify=True)) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["tokens"], second["new_tokens"], second["verified"]) == (1500, 800, True)
    assert main(command(model, text, out)) == 0
    assert "1,500 tokens in 1 shards" in capsys.readouterr().out
    for name in ("dataset.json", "shard_00000.safetensors"):
        assert (out / name).read_bytes() == (stored / name).read_bytes()


def test_ctrl_c_and_the_same_command(model: Path, text: Path, tmp_path: Path) -> None:
    # All three in processes of their own: the same bits want the same libraries and threads.
    words, whole = (
        [sys.executable, "-m", "mlxsae.cli", *command(model, text, out, max_tokens=None, lm_batch_size=1)]
        for out in (tmp_path / "x", tmp_path / "y")
    )
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "x").is_dir() or not any((tmp_path / "x").iterdir()):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(2)
    said, err = process.communicate()
    if process.returncode == -2:
        # It had said all, and was leaving: an interpreter that ends handles no signal.
        assert not err
        assert "tokens in" in said
    elif process.returncode:  # else it was done before the signal came
        assert process.returncode == 130, err
        assert "tokens are stored in" in err
        assert "the same command goes on" in err
    for again in (words, whole):
        subprocess.run(again, check=True, capture_output=True)
    ActivationDataset.open(tmp_path / "x").verify()
    for path in (tmp_path / "y").iterdir():
        assert path.read_bytes() == (tmp_path / "x" / path.name).read_bytes()


def test_training_on_stored_activations(stored: Path, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(training(stored, out, "--layer", "2", "--component", "mlp_in")) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "done"
    assert run["config"]["hook_name"] == "blocks.2.mlp.hook_in"
    assert run["options"]["context_size"] == 32
    assert run["options"]["model"] == str(model)
    assert run["options"]["dataset"] == str(text)
    assert run["activations"]["path"] == str(stored)
    assert 0 < run["results"]["fvu"] < 1
    assert run["results"]["n_tokens"] > 100
    sae = native.load(out)
    assert sae.metadata["hook_name"] == "blocks.2.mlp.hook_in"
    assert main(["eval", str(out), "--json"]) == 0
    # resid, as without --activations, where a layer has several
    assert main(training(stored, tmp_path / "resid", "--layer", "1")) == 0
    assert native.load(tmp_path / "resid").metadata["hook_name"] == "blocks.1.hook_resid_post"


def weights_of(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "sae_weights.safetensors")))


@pytest.mark.parametrize("where", ["stored", "model"])
def test_several_saes_from_one_pass_are_those_trained_alone(
    where: str, stored: Path, model: Path, text: Path, tmp_path: Path, capsys
) -> None:
    def train(out: Path, *more: str) -> Path:
        words = training(stored, out, *more)
        if where == "model":
            at = words.index("--activations")
            words[at : at + 2] = ["--model", str(model), "--dataset", str(text), "--context-size", "32"]
        assert main(words) == 0
        return out

    several = train(
        tmp_path / "several",
        "--layer",
        "1",
        "--layer",
        "2",
        "--component",
        "resid,mlp_in",
        "--max-tokens",
        "2000",
    )
    shown = capsys.readouterr().out
    names = [f"blocks.{n}.{site}" for n in (1, 2) for site in ("hook_resid_post", "mlp.hook_in")]
    assert {p.name for p in several.iterdir()} == {*names, "run.json"}
    run = json.loads((several / "run.json").read_text())
    assert list(run["results"]) == names
    assert list(run["config"]["hook_points"]) == names
    assert all(f"{name}\n" in shown and f"Saved in {several / name}" in shown for name in names)
    assert set(load_saes(several)) == {lm.HookPoint.parse(name) for name in names}
    alone = train(tmp_path / "alone", "--layer", "2", "--component", "mlp_in", "--max-tokens", "2000")
    a, b = weights_of(several / names[-1]), weights_of(alone)
    assert all(mx.array_equal(a[key], b[key]) for key in b)
    assert native.load(several / names[-1]).metadata["hook_name"] == names[-1]
    capsys.readouterr()  # the held-out text is known from the run that made it
    assert main(["eval", str(several / names[-1]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fvu"] == pytest.approx(run["results"][names[-1]]["fvu"], rel=1e-6)
    assert main(["eval", str(several)]) == 1
    assert f"holds several SAEs: give one, of {several / names[0]}, " in capsys.readouterr().err
    assert main(["train", "--resume", str(several), "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == set(names)


def test_a_broken_off_training_goes_on_bit_for_bit(stored: Path, tmp_path: Path, monkeypatch) -> None:
    import mlxsae.data.dataset as datasets

    more = ("--layer", "1", "--component", "resid", "mlp_out", "--checkpoint-every", "7")
    assert main(training(stored, tmp_path / "whole", *more)) == 0
    real, taken = datasets.DatasetSource.next_batch, [0]

    def breaks(self: Any) -> Any:
        taken[0] += 1
        if taken[0] == 18:
            raise RuntimeError("broken off")
        return real(self)

    monkeypatch.setattr(datasets.DatasetSource, "next_batch", breaks)
    assert main(training(stored, tmp_path / "broken", *more)) == 1
    assert main(["train", "--resume", str(tmp_path / "broken"), "--quiet"]) == 0
    for part in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
        a, b = (weights_of(tmp_path / name / part) for name in ("whole", "broken"))
        assert all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": [9]}, "layer must be in [0, 3]"),
        ({"dataset": "nowhere.json"}, "nowhere.json"),
        ({"model": "nowhere"}, "nowhere"),
        ({"context_size": 33}, "context_size must be 32 but got 33"),
        ({"dtype": "int8"}, "streams must be"),
        ({"min_norm": 2}, "min_norm must be 0.0 but got 2.0"),
        ({"seed": 2}, "seed must be 0 but got 2"),
    ],
)
def test_what_cannot_go_on_is_said_in_one_sentence(
    change: dict[str, Any], message: str, model: Path, text: Path, stored: Path, capsys
) -> None:
    before = {p.name: p.read_bytes() for p in stored.iterdir()}
    given = {"model": model, "text": text, "max_tokens": 2000} | change
    assert main(command(given.pop("model"), given.pop("text"), stored, **given)) == 1
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert {p.name: p.read_bytes() for p in stored.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--layer and --component must say which"),
        (("--layer", "3"), "must name hook points of"),
        (("--layer", "1", "--component", "resid", "attn"), "must name hook points of"),
    ],
)
def test_which_activations_to_train_on(
    more: tuple[str, ...], message: str, stored: Path, tmp_path: Path, capsys
) -> None:
    assert main(training(stored, tmp_path / "x", *more)) == 1
    assert message in capsys.readouterr().err
    assert main(training(tmp_path / "nothing", tmp_path / "x", *more)) == 1
    assert "dataset.json" in capsys.readouterr().err


def test_wrong_usage(capsys) -> None:
    for words in (
        ["harvest"],
        ["harvest", "--dtype", "int3"],
        ["harvest", "--layer", "x"],
        ["harvest", "--layer", "1,x"],
        ["harvest", "--component", "soul"],
    ):
        assert main(words) == 2
    assert "mlp, attn" in capsys.readouterr().err
