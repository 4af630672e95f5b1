"""The README's example runs as it stands."""

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
