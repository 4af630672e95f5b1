"""The examples of README and docs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    fvu, shape = capsys.readouterr().out.splitlines()
    assert 0 < float(fvu) < 0.3
    assert shape == "(2048, 128)"
    assert {p.name for p in (tmp_path / "my_sae").iterdir()} >= {"cfg.json", "sae_weights.safetensors"}


def test_the_example_of_language_models_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(
        r"```python\n(.*?)```", (README.parent / "docs" / "language-models.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "language-models.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert names["pattern"].shape == (1, 4, 4, 4)
    assert names["features"].values.shape == (1, 4, 32)
    assert (tmp_path / "saes" / "2" / "cfg.json").is_file()


def test_the_tables_of_hook_points_and_families_are_the_codes():
    from mlxsae.lm import FAMILIES, SITES, HookPoint

    text = (README.parent / "docs" / "language-models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|.*\|(.*)\|$", text, re.M)
    assert {site: name for site, name, _ in rows} == SITES
    for site, _, aliases in rows:
        for alias in re.findall("`([^`]+)`", aliases):
            assert HookPoint.parse(alias, layer=1) == HookPoint(1, site)
    named = re.search(r"Known block by block are (.*?);", text, re.S)
    assert set(re.findall(r"[a-z]\w+", re.sub(r"\(.*?\)| and ", " ", named[1].replace("\n", " ")))) == set(
        FAMILIES
    )


def test_the_examples_of_training_run(tmp_path, monkeypatch, capsys):
    examples = re.findall(r"```python\n(.*?)```", (README.parent / "docs" / "training.md").read_text(), re.S)
    assert len(examples) == 7
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in examples:
        exec(compile(example, "training.md", "exec"), names)
    out = capsys.readouterr().out
    assert "step 100: loss" in out
    assert "run  best recon_loss" in out
    assert (tmp_path / "my_sae" / "cfg.json").is_file()
    assert len(list((tmp_path / "runs" / "k4" / "best").iterdir())) == 2
