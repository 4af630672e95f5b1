"""Rows of the real `datasets` library, streamed from a local file, as a hub's dataset would come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import mlx.core as mx
import numpy as np
import pytest

from lm_toys import write_folder
from mlxsae import lm
from mlxsae.data import ActivationDataset

TEXTS = [
    f"The {a} {b} hen ran. {'So it was. ' * (len(a) % 4)}" for a in ("old", "red", "big") for b in "abcdefgh"
]


@pytest.fixture
def rows_of(tmp_path: Path) -> Any:
    """A function that opens the texts as a `datasets.IterableDataset` of `{"id", "story"}`."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "story": t}) for i, t in enumerate(TEXTS)))
    load = datasets.load_dataset
    return lambda **options: load("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), **options)


def test_a_dataset_of_the_hub_by_its_name(
    rows_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lm.load(write_folder(tmp_path / "model"))
    kinds = []

    def load_dataset(path: str, config: str | None, **options: Any) -> Any:
        assert (path, config) == ("someone/stories", "small")
        rows = rows_of(**options)
        kinds.append(type(rows))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    common: dict[str, Any] = {"layer": 1, "component": "resid", "context_size": 16, "lm_batch_size": 3}
    found = []
    for name, streaming in (("streamed", True), ("held", False)):
        made = ActivationDataset.from_huggingface(
            model,
            "someone/stories:small",
            text_field="story",
            streaming=streaming,
            cache_dir=tmp_path / name,
            **common,
        )
        found.append(np.array(next(made.batches(10**6, shuffle=False))))
    assert set(kinds) == {datasets.IterableDataset}
    plain = ActivationDataset.from_texts(model, TEXTS, cache_dir=tmp_path / "plain", **common)
    want = np.array(next(plain.batches(10**6, shuffle=False)))
    assert len(want) > 500
    for rows in found:
        np.testing.assert_array_equal(rows, want)
    with pytest.raises(ValueError, match="its string fields: story"):
        ActivationDataset.from_huggingface(model, "someone/stories:small", **common)


def test_rows_may_be_walked_again_and_gone_on_with(rows_of: Any, tmp_path: Path) -> None:
    model = lm.load(write_folder(tmp_path / "model"))
    for streaming in (True, False):
        documents = lm.Documents(rows_of(split="train", streaming=streaming), "story")
        assert list(documents) == list(documents) == TEXTS
        batches = lm.token_batches(
            model, documents, context_size=16, batch_size=4, max_tokens=1500, epochs=None
        )
        assert sum(int(mx.sum(b.valid).item()) for b in batches) == 1500
    # Objects of the library go straight in, and an interrupted folder goes on with them.
    rows = rows_of(split="train", streaming=True).rename_column("story", "text")
    common: dict[str, Any] = {"layer": 1, "context_size": 16, "shard_bytes": 8000}
    ActivationDataset.from_texts(model, rows, cache_dir=tmp_path / "set", max_samples=300, **common)
    more = ActivationDataset.from_texts(model, rows, cache_dir=tmp_path / "set", max_samples=600, **common)
    whole = ActivationDataset.from_texts(model, rows, cache_dir=tmp_path / "whole", max_samples=600, **common)
    a, b = (np.array(next(made.batches(600, shuffle=False))) for made in (more, whole))
    np.testing.assert_array_equal(a, b)
