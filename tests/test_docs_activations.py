"""The examples of docs/activations.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "activations.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    exec(compile(first, "activations.md", "exec"), names)
    assert len(names["train"]) + len(names["heldout"]) == len(names["data"]) > 10_000
    assert names["data"].statistics("blocks.1.hook_resid_post").scale > 0
    names["texts"] = names["lm"].tiny.texts(100, seed=1)
    exec(compile(second, "activations.md", "exec"), names)
    assert names["x"].shape[1] == 128
