"""Activations of language models onto disk: what is stored, and what survives."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_toys import write_folder
from mlxsae import data, lm
from mlxsae.data import ActivationDataset
from mlxsae.data.model_activations import ModelActivations
from mlxsae.data.shards import read_index

TEXTS = [
    f"The {a} {b} ran home. Did it?"
    for a in ("big", "old", "sad", "red")
    for b in ("dog", "cat", "Fox", "hen")
]
RESID = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> lm.LanguageModel:
    return lm.load(write_folder(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(scope="module")
def toys(toy: lm.LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> list[lm.LanguageModel]:
    return [toy, lm.load(write_folder(tmp_path_factory.mktemp("models") / "toy", bos=False))]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def expected_rows(
    model: lm.LanguageModel, texts: list[str], points: list[str], **options: Any
) -> dict[str, np.ndarray]:
    """Straight from the definition: every pass, every valid row."""
    found: dict[str, list[np.ndarray]] = {point: [] for point in points} | {"tokens": []}
    for tokens, valid in lm.token_batches(model, texts, context_size=16, batch_size=3, **options):
        mask = np.array(valid)
        for point, x in lm.capture(model, tokens, points).items():
            found[str(point)].append(np.array(x)[mask])
        found["tokens"].append(np.array(tokens)[mask])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def make(
    model: lm.LanguageModel, where: Path | None, texts: Any = TEXTS, **options: Any
) -> ActivationDataset:
    chosen: dict[str, Any] = {
        "hook_points": [RESID],
        "cache_dir": where,
        "context_size": 16,
        "lm_batch_size": 3,
        "shuffle": False,
        "shard_bytes": 5000,
    }
    return ActivationDataset.from_texts(model, texts, **(chosen | options))


def sorted_rows(a: np.ndarray) -> np.ndarray:
    return a[np.lexsort(a.T)]


# ---- what is stored


def test_every_valid_row_is_stored_once(toy: lm.LanguageModel, tmp_path: Path) -> None:
    points = [
        "blocks.1.hook_resid_post",
        "blocks.2.mlp.hook_in",
        "blocks.2.hook_mlp_out",
        "blocks.0.hook_attn_out",
    ]
    made = make(toy, tmp_path / "x", hook_points=points)
    expected = expected_rows(toy, TEXTS, points)
    assert made.hook_points == points
    batch = next(made.batches(10**6, hook_points=points, tokens=True, shuffle=False))
    # One order for all streams: put back in the order of the text by the rows of the first.
    for name in points:
        assert np.array_equal(
            sorted_rows(np.column_stack([batch["tokens"], batch[points[0]], batch[name]])),
            sorted_rows(np.column_stack([expected["tokens"], expected[points[0]], expected[name]])),
        )
    assert len(made.metadata["shards"]) > 1
    x, y = next(made.batches(64, hook_points=(("mlp_in", 2), "layers.2.mlp")))
    both = made.source(64, hook_points=("blocks.2.mlp.hook_in", ("mlp_out", 2)))
    batch = both.next_batch()
    assert batch is not None
    assert mx.array_equal(batch[0], x)
    assert mx.array_equal(batch[1], y)
    several = next(made.batches(64, hook_points=[RESID, (("mlp_in", 2), "layers.2.mlp")]))
    assert list(several) == [RESID, "blocks.2.mlp.hook_in"]
    assert mx.array_equal(several["blocks.2.mlp.hook_in"][1], y)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("abZ. é<s>", min_size=1, max_size=40), min_size=1, max_size=10),
    context_size=st.integers(2, 20),
    batch_size=st.integers(1, 5),
    which=st.integers(0, 1),
    seed=st.integers(0, 3),
)
def test_no_special_token_reaches_a_trainer(
    toys: list[lm.LanguageModel], texts: list[str], context_size: int, batch_size: int, which: int, seed: int
) -> None:
    """Padding, BOS, EOS, unknown: whichever way activations go. At the first block's input a row is the embedding
    of its token and tells what it was."""
    model = toys[which]
    embedding = np.array(model.model.model.embed_tokens.weight)  # type: ignore[union-attr]
    special = sorted(model.special_ids)
    ordinary = sorted(i for text in texts if text.strip() for i in model.encode(text) if i not in special)

    def tokens_of(rows: Iterator[Any]) -> list[int]:
        x = np.concatenate([np.array(r) for r in rows])
        distance = np.abs(x[:, None] - embedding[None]).sum(axis=-1)
        assert (distance.min(axis=1) == 0).all()
        return sorted(distance.argmin(axis=1).tolist())

    options: dict[str, Any] = {"context_size": context_size, "seed": seed}
    point = "blocks.0.hook_resid_pre"

    def batches() -> Iterator[lm.TokenBatch]:
        return lm.token_batches(model, texts, batch_size=batch_size, **options)

    if not ordinary:
        with pytest.raises(ValueError, match=r"at least one (valid token|document)"):
            make(model, None, texts, hook_points=[point], lm_batch_size=batch_size, **options)
        return
    made = make(model, None, texts, hook_points=[point], lm_batch_size=batch_size, shuffle=True, **options)
    assert tokens_of(made.batches(7)) == ordinary
    stored = next(made.batches(10**5, tokens=True))["tokens"]
    assert sorted(np.array(stored).tolist()) == ordinary
    assert not np.isin(np.array(stored), special).any()

    stream = data.ShuffleBuffer(
        ModelActivations(model, lm.HookPoint.parse(point), batches), batch_size=7, capacity=50
    )
    streamed = []
    while (batch := stream.next_batch()) is not None:
        streamed.append(batch[0])
    assert tokens_of(iter(streamed)) == ordinary

    with data.ActivationCollector(model, point) as collector:
        for tokens, valid in batches():
            collector.valid = valid
            model(tokens)
    assert tokens_of(iter(collector.get_activations().values())) == ordinary
    if which == 0:  # padding is <unk> there, which is special, so that even a bare batch is safe
        found = data.collect_activations_from_dataloader(model, (b.tokens for b in batches()), point)
        assert tokens_of(iter(found.values())) == ordinary


def test_one_hook_point_needs_no_list(toy: lm.LanguageModel) -> None:
    for one in (RESID, ("output", 1), lm.HookPoint.parse(RESID)):
        made = make(toy, None, hook_points=one, max_samples=20)
        assert made.hook_points == [RESID]


def test_small_and_large_norms_are_left_out(toy: lm.LanguageModel, tmp_path: Path) -> None:
    rows = expected_rows(toy, TEXTS, [RESID])[RESID]
    norm = np.linalg.norm(rows, axis=1)
    ranked = np.unique(norm.round(4))
    least = float(
        ranked[len(ranked) // 3 :][:2].mean()
    )  # between two norms, so that rounding decides nothing
    made = make(toy, tmp_path / "a", min_norm=least)
    found = next(made.batches(10**6))
    assert np.array_equal(sorted_rows(np.array(found)), sorted_rows(rows[norm >= least]))
    kept = []
    for tokens, valid in lm.token_batches(toy, TEXTS, context_size=16, batch_size=3):
        x = np.array(lm.capture(toy, tokens, RESID)[lm.HookPoint.parse(RESID)])[np.array(valid)]
        n = np.linalg.norm(x, axis=1)
        kept.append(x[n <= 1.1 * np.median(n)])
    expected = np.concatenate(kept)
    assert 0 < len(expected) < len(rows)
    found = next(make(toy, tmp_path / "b", max_norm_ratio=1.1).batches(10**6))
    assert np.array_equal(sorted_rows(np.array(found)), sorted_rows(expected))


def test_a_temporary_folder_goes_with_the_dataset(toy: lm.LanguageModel) -> None:
    made = make(toy, None)
    folder, part = made.directory, made[:10]
    assert folder is not None
    del made
    assert len(next(part.batches(100))) == 10
    del part
    assert not folder.exists()


def test_a_source_keeps_the_temporary_folder_it_reads(toy: lm.LanguageModel) -> None:
    made = make(toy, None)
    folder, rows = made.directory, len(made)
    assert folder is not None
    source = made.source(7, epochs=2)
    del made
    assert sum(len(x) for (x,) in iter(source.next_batch, None)) == 2 * rows
    del source
    assert not folder.exists()


@pytest.mark.parametrize("most", [1, 100, 157, 10**6])
def test_max_samples_is_exact(toy: lm.LanguageModel, tmp_path: Path, most: int) -> None:
    rows = expected_rows(toy, TEXTS, [RESID])[RESID]
    made = make(toy, tmp_path / "x", max_samples=most)
    n = min(most, len(rows))
    assert len(made) == n
    assert made.metadata["exhausted"] == (most > len(rows))
    assert np.array_equal(sorted_rows(np.array(next(made.batches(10**6)))), sorted_rows(rows[:n]))


def test_files_folders_and_the_hub(
    toy: lm.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in TEXTS[:8]))
    (tmp_path / "text" / "b.json").write_text(json.dumps([{"body": t} for t in TEXTS[8:]]))
    options: dict[str, Any] = {
        "hook_points": [RESID],
        "context_size": 16,
        "lm_batch_size": 3,
        "shuffle": False,
        "shard_bytes": 5000,
    }
    expected = expected_rows(toy, TEXTS, [RESID])[RESID]
    made = ActivationDataset.from_huggingface(toy, str(tmp_path / "text"), text_field="body", **options)
    assert np.array_equal(sorted_rows(np.array(next(made.batches(10**6)))), sorted_rows(expected))

    asked: list[Any] = []

    def load_dataset(
        path: str, config: str | None, *, split: str, streaming: bool
    ) -> Iterator[dict[str, str]]:
        asked.append((path, config, split, streaming))
        return ({"body": t} for t in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    where = tmp_path / "hub"
    for streaming in (True, False):
        made = ActivationDataset.from_huggingface(
            toy,
            "someone/texts:en",
            text_field="body",
            streaming=streaming,
            cache_dir=where / str(streaming),
            **options,
        )
        assert np.array_equal(sorted_rows(np.array(next(made.batches(10**6)))), sorted_rows(expected))
    assert set(asked) == {("someone/texts", "en", "train", True)}
    assert made.metadata["recipe"]["text"]["source"] == "someone/texts:en"
    monkeypatch.delitem(sys.modules, "datasets")
    real_import = builtins.__import__

    def no_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(ImportError, match="pip install datasets"):
        ActivationDataset.from_huggingface(toy, "someone/texts", **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_small_types_hold_what_the_model_said(toy: lm.LanguageModel, tmp_path: Path, dtype: str) -> None:
    exact = next(make(toy, tmp_path / "f").batches(10**6, shuffle=False))
    # The same shards, so that rows lie at the same places.
    rows = len(ActivationDataset.open(tmp_path / "f"))
    small = make(toy, tmp_path / dtype, dtype=dtype, shard_bytes=10**6)
    large = make(toy, tmp_path / "g", shard_bytes=10**6)
    a = np.array(next(small.batches(rows, shuffle=False)).astype(mx.float32))
    b = np.array(next(large.batches(rows, shuffle=False)))
    assert np.array_equal(sorted_rows(b), sorted_rows(np.array(exact)))
    assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_several_hook_points_stream_from_one_pass(toy: lm.LanguageModel) -> None:
    """In the order asked for; a tuple of two would be a hook point's name as well as two of them."""
    points = tuple(lm.HookPoint.parse(p) for p in (("mlp_out", 2), ("resid", 1), ("mlp_in", 2)))

    def stream() -> data.ShuffleBuffer:
        batches = partial(lm.token_batches, toy, TEXTS, context_size=16, batch_size=3)
        return data.ShuffleBuffer(ModelActivations(toy, points, batches), batch_size=50, capacity=100)

    expected = expected_rows(toy, TEXTS, [str(p) for p in points])
    source, rows = stream(), []
    for step in range(100):
        if step == 3:  # taken up again by another
            position, arrays = source.state()
            source = stream()
            source.restore(json.loads(json.dumps(position)), arrays)
        batch = source.next_batch()
        if batch is None:
            break
        rows.append(np.concatenate([np.array(x) for x in batch], axis=1))
    whole = np.concatenate([expected[str(p)] for p in points], axis=1)
    assert np.array_equal(sorted_rows(np.concatenate(rows)), sorted_rows(whole))


def test_a_model_trains_on_a_dataset(toy: lm.LanguageModel, tmp_path: Path) -> None:
    import mlxsae

    made = make(toy, tmp_path / "x", hook_points=[RESID, ("mlp_in", 2)])
    config = mlxsae.SAEConfig(
        k=4, expansion_factor=4, train=mlxsae.TrainConfig(total_tokens=2000, batch_size=100)
    )
    sae = mlxsae.InterpretableModel(toy).train_sae(2, "mlp_in", dataset=made, config=config)
    assert sae.metadata["hook_name"] == "blocks.2.mlp.hook_in"
    assert sae.metadata["training"]["tokens"] == 2000


# ---- going on


def test_a_finished_folder_is_used_as_it_is(toy: lm.LanguageModel, tmp_path: Path, monkeypatch) -> None:
    make(toy, tmp_path / "x")
    before = digests(tmp_path / "x")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").iterdir()}
    import mlxsae.data.harvest as harvesting

    real = harvesting.capture

    def only_shapes(model: Any, tokens: mx.array, points: Any) -> Any:
        assert tokens.size <= 3, "the model must not run on text again"
        return real(model, tokens, points)

    monkeypatch.setattr(harvesting, "capture", only_shapes)
    make(toy, tmp_path / "x")
    assert digests(tmp_path / "x") == before
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "x").iterdir()}


def test_more_may_be_asked_for_later(toy: lm.LanguageModel, tmp_path: Path) -> None:
    make(toy, tmp_path / "whole", max_samples=400)
    for most in (37, 200, 100, 201, 400):
        made = make(toy, tmp_path / "grown", max_samples=most)
        assert len(made) >= most
    assert digests(tmp_path / "grown") == digests(tmp_path / "whole")


def test_fewer_may_be_asked_for_after_an_interruption(
    toy: lm.LanguageModel, tmp_path: Path, monkeypatch
) -> None:
    """What is there is enough then: nothing is added, whatever falls between the last shard's end and the batch's."""
    make(toy, tmp_path / "whole")
    break_off(toy, tmp_path / "x", 10, monkeypatch)
    rows = len(ActivationDataset.open(tmp_path / "x"))
    end = read_index(tmp_path / "x")["shards"][-1]["end"]["row"]  # type: ignore[index]
    for fewer in (rows - end - 1, rows - end - 5, 1, rows):
        shutil.copytree(tmp_path / "x", tmp_path / str(fewer))
        made = make(toy, tmp_path / str(fewer), max_samples=fewer)
        assert len(made) == rows
        assert made.metadata["complete"]
        assert not made.metadata["exhausted"]
        make(toy, tmp_path / str(fewer))
        assert digests(tmp_path / str(fewer)) == digests(tmp_path / "whole")


def test_asking_for_more_costs_nothing_that_is_there(
    toy: lm.LanguageModel, tmp_path: Path, monkeypatch
) -> None:
    """A call that is refused or broken off before it has a shard leaves a finished folder as it was."""
    rows = len(make(toy, tmp_path / "x", max_samples=200, shard_bytes=1 << 20))  # one shard, and not full
    before = digests(tmp_path / "x")
    break_off(toy, tmp_path / "x", 4, monkeypatch, max_samples=400, shard_bytes=1 << 20)
    assert digests(tmp_path / "x") == before
    assert len(ActivationDataset.open(tmp_path / "x")) == rows
    make(toy, tmp_path / "x", max_samples=400, shard_bytes=1 << 20)
    make(toy, tmp_path / "whole", max_samples=400, shard_bytes=1 << 20)
    assert digests(tmp_path / "x") == digests(tmp_path / "whole")


def test_a_harvest_with_activations_that_are_nan_goes_on(tmp_path: Path) -> None:
    """They are kept, to be seen; those computed again are the same ones, and in other places they are another model's."""
    model = lm.load(write_folder(tmp_path / "toy"))
    layer = model.model.layers[1].mlp.down_proj
    weight = layer.weight
    layer.weight = weight.at[3].multiply(mx.nan)
    make(model, tmp_path / "whole", max_samples=400)
    for most in (300, 400):
        make(model, tmp_path / "x", max_samples=most)
    assert digests(tmp_path / "x") == digests(tmp_path / "whole")
    layer.weight = weight.at[4].multiply(mx.nan)
    with pytest.raises(ValueError, match="the model must be the same"):
        make(model, tmp_path / "x", max_samples=401)


def break_off(
    model: lm.LanguageModel, where: Path, passes: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Interrupt a harvest in one of its passes through the model."""
    import mlxsae.data.harvest as harvesting

    real, left = harvesting.capture, [passes]

    def breaks(model: Any, tokens: mx.array, points: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(model, tokens, points)

    with monkeypatch.context() as patch:
        patch.setattr(harvesting, "capture", breaks)
        with pytest.raises(KeyboardInterrupt):
            make(model, where, **options)


def test_what_is_not_equal_is_refused(toy: lm.LanguageModel, tmp_path: Path) -> None:
    make(toy, tmp_path / "x", max_samples=200)

    def again(model: lm.LanguageModel = toy, texts: Any = TEXTS, **options: Any) -> None:
        make(model, tmp_path / "x", texts, max_samples=400, **options)

    before = digests(tmp_path / "x")
    other = lm.LanguageModel(toy.model, toy.tokenizer, "other")
    for change, message in (
        ({"context_size": 17}, "recipe.batching.context_size must be 16 but got 17"),
        ({"dtype": "bfloat16"}, "streams must be"),
        ({"hook_points": ["blocks.2.hook_resid_post"]}, "streams must be"),
        ({"min_norm": 1.0}, "recipe.min_norm must be 0.0"),
        ({"seed": 3}, "seed must be 0 but got 3"),
        ({"texts": [*TEXTS[:-1], "other"]}, "recipe.text.digest"),
        ({"model": other}, "recipe.model.name must be 'toy'"),
    ):
        with pytest.raises(ValueError, match=message):
            again(**change)
    assert digests(tmp_path / "x") == before


def test_text_or_model_that_changed_underneath_is_noticed(tmp_path: Path) -> None:
    """Neither shows in the recipe; what stands where the last shard ends gives them away."""
    folder = write_folder(tmp_path / "toy")
    model = lm.load(folder)
    text = tmp_path / "text.json"
    text.write_text(json.dumps(TEXTS))

    def again(model: lm.LanguageModel = model, most: int = 400) -> None:
        ActivationDataset.from_huggingface(
            model,
            str(text),
            hook_points=[RESID],
            cache_dir=tmp_path / "x",
            context_size=16,
            lm_batch_size=3,
            shuffle=False,
            max_samples=most,
            shard_bytes=5000,
        )

    again(most=300)
    before = digests(tmp_path / "x")
    for changed in (TEXTS[8:] + TEXTS[:8], TEXTS[:5]):
        text.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="the text must be the same"):
            again()
        assert digests(tmp_path / "x") == before
    text.write_text(json.dumps(TEXTS))
    layer = model.model.layers[0]
    weight = layer.mlp.down_proj.weight
    layer.mlp.down_proj.weight = mx.concatenate([weight[:8], 3 * weight[8:]])  # its first numbers stay
    with pytest.raises(ValueError, match="the model must be the same"):
        again()
    layer.mlp.down_proj.weight = weight
    again()


def test_an_interrupted_harvest_within_one_process(
    toy: lm.LanguageModel, tmp_path: Path, monkeypatch
) -> None:
    import mlxsae.data.harvest as harvesting

    make(toy, tmp_path / "whole")
    real, calls = harvesting.capture, [0]

    def breaks(model: Any, tokens: mx.array, points: Any) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 0:
            raise KeyboardInterrupt
        return real(model, tokens, points)

    monkeypatch.setattr(harvesting, "capture", breaks)
    broken = 0
    while True:
        try:
            make(toy, tmp_path / "broken")
            break
        except KeyboardInterrupt:
            broken += 1
            assert broken < 50
    assert broken >= 3
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


# A model and a tokenizer in a few lines: starting it takes a fraction of what mlx-lm takes to be imported.
TOY = """
import sys
import mlx.core as mx, mlx.nn as nn
from mlxsae import lm
from mlxsae.data import ActivationDataset
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(48, 48)
    def __call__(self, x, mask=None, cache=None):
        return x + mx.tanh(self.mlp(x + mx.cumsum(x, axis=1) / x.shape[1]))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(128, 48), [Block() for _ in range(3)]
    def __call__(self, tokens, cache=None):
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h, None, None)
        return self.embed.as_linear(h)
class Letters:
    bos_token_id, eos_token_ids, all_special_ids = 1, {2}, [0, 1, 2]
    def encode(self, text, **_):
        return list(text.encode())
mx.random.seed(0)
model = lm.LanguageModel(Net(), Letters(), "toy")
texts = [f"Story {'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10 % 10]} of {i} old red hens." for i in range(3000)]
print("begun", flush=True)
try:
    made = ActivationDataset.from_texts(
        model, texts, layer=[1, 2], component="resid", cache_dir=sys.argv[1], context_size=32, lm_batch_size=4,
        shard_bytes=500_000, dtype=sys.argv[2], max_samples=int(sys.argv[3]),
    )
except OSError as e:
    print(e)
    sys.exit(7)
"""


def digest_of(where: Path) -> dict[str, str]:
    """Of a folder that must be whole."""
    ActivationDataset.open(where).verify()
    return digests(where)


@pytest.mark.slow
def test_killed_ten_times_at_random_and_resumed(tmp_path: Path) -> None:
    def start(where: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", TOY, str(where), "int8", "90000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    process, begun = start(tmp_path / "whole"), time.perf_counter()
    assert process.wait() == 0
    seconds = time.perf_counter() - begun

    rng, kills, stages = random.Random(0), 0, set()
    where = tmp_path / "killed"
    while kills < 10:
        process = start(where)
        time.sleep(rng.uniform(0, 0.5) * seconds)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        index = read_index(where) if where.is_dir() else None
        stages.add(len(index["shards"]) if index else 0)
        if index and index["complete"]:  # too far too soon: begin again, with the kills that are left
            shutil.rmtree(where)
    assert start(where).wait() == 0
    assert digest_of(where) == digest_of(tmp_path / "whole")
    assert len(stages) > 2


def harvest_into(where: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TOY, str(where), "float32", "6000"]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_a_file_that_may_not_grow_is_a_clear_error(tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))

    done = harvest_into(tmp_path / "x", preexec_fn=limit)
    assert done.returncode == 7, done.stderr
    assert "shard_00000.safetensors must be written whole but the system says: File too large" in done.stdout
    assert "0 shards before it (0 rows) are complete; make room and run it again" in done.stdout
    assert not list((tmp_path / "x").iterdir())


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small disk")
    try:
        assert harvest_into(tmp_path / "whole").returncode == 0
        done = harvest_into(disk / "x")
        assert done.returncode == 7, done.stderr
        assert "No space left on device. The 2 shards before it" in done.stdout
        kept = {p.name: p.read_bytes() for p in (disk / "x").iterdir()}
        assert set(kept) == {"dataset.json", "shard_00000.safetensors", "shard_00001.safetensors"}
        ActivationDataset.open(disk / "x").verify()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert harvest_into(disk / "x").returncode == 0
        assert digest_of(disk / "x") == digest_of(tmp_path / "whole")
        assert all((disk / "x" / n).read_bytes() == b for n, b in kept.items() if n != "dataset.json")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


MEMORY = """
import re
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
found = [0]
read = lm.text._batches
def watched(*args):
    for batch in read(*args):
        found[-1] = max(found[-1], anonymous())
        yield batch
lm.text._batches = watched
for n in (20_000, 120_000):
    ActivationDataset.from_texts(
        model, texts * 2, layer=[0, 1, 2], component="resid", cache_dir=f"{sys.argv[1]}/{n}", max_samples=n,
        context_size=32, lm_batch_size=32, shard_bytes=2_000_000)
    found.append(0)
assert min(found[:2]) > 10_000_000
print(found[1] - found[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_what_is_harvested(tmp_path: Path) -> None:
    code = TOY[: TOY.index("try:")] + MEMORY
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 8e6  # of 58 MB more


# ---- the collector


def test_the_collector_sees_what_capture_sees(toy: lm.LanguageModel) -> None:
    batches = list(lm.token_batches(toy, TEXTS, context_size=16, batch_size=3))
    points = [RESID, ("mlp_in", 2)]
    plain = [np.array(toy(b.tokens)) for b in batches]
    base = type(toy.model)
    with data.ActivationCollector(toy, points, max_activations=100) as collector:
        logits = []
        for tokens, valid in batches:
            collector.valid = valid
            logits.append(np.array(toy(tokens)))
    assert type(toy.model) is base
    assert all(np.array_equal(a, b) for a, b in zip(plain, logits, strict=True))
    found = collector.get_activations()
    expected = expected_rows(toy, TEXTS, [RESID, "blocks.2.mlp.hook_in"])
    assert collector.full
    for name, x in found.items():
        assert np.array_equal(np.array(x), expected[name][:100])
    before = collector.count
    toy(batches[0].tokens)  # outside the block
    assert collector.count == before


def test_the_collector_leaves_no_trace_of_an_error(toy: lm.LanguageModel) -> None:
    base = type(toy.model)
    collector = data.ActivationCollector(toy, RESID)

    def passes() -> None:
        with collector:
            toy(mx.array([[5, 6]]))
            collector.valid = mx.array([[1, 1]])
            toy(mx.array([[5, 6]]))

    with pytest.raises(ValueError, match="valid must be bool of shape"):
        passes()
    assert type(toy.model) is base
    assert collector.get_activations()[RESID].shape == (2, 32)
    with pytest.raises(ValueError, match="max_activations"):
        data.ActivationCollector(toy, RESID, 0)


def test_the_collector_does_not_see_other_threads(toy: lm.LanguageModel) -> None:
    tokens = mx.array([[5, 6, 7]])
    with data.ActivationCollector(toy, RESID) as collector:
        collector.valid = mx.array([[True, False, True]])
        thread = threading.Thread(target=lambda: mx.eval(toy(mx.array([[7, 8, 9, 10]]))))
        thread.start()
        thread.join()
        toy(tokens)
    expected = lm.capture(toy, tokens, RESID)[RESID][0]
    assert np.array_equal(np.array(collector.get_activations()[RESID]), np.array(expected)[[0, 2]])


def test_collectors_may_leave_in_any_order(toy: lm.LanguageModel) -> None:
    base, tokens = type(toy.model), mx.array([[5, 6]])
    first, second = data.ActivationCollector(toy, RESID), data.ActivationCollector(toy, ("mlp_in", 0))
    first.__enter__()
    second.__enter__()
    toy(tokens)
    first.__exit__(None, None, None)
    toy(tokens)
    second.__exit__(None, None, None)
    assert (first.count, second.count) == (2, 4)
    assert type(toy.model) is base


def test_collect_activations(toy: lm.LanguageModel) -> None:
    found = data.collect_activations(toy, RESID, TEXTS, max_activations=50)
    assert found.shape == (50, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook_points": []}, "one or several"),
        ({"hook_points": [RESID], "max_samples": 0}, "max_rows"),
        ({"hook_points": [RESID], "dtype": "int4"}, "dtype"),
        ({"hook_points": [RESID], "min_norm": -1}, "min_norm"),
        ({"hook_points": [RESID], "max_norm_ratio": 0.5}, "max_norm_ratio"),
        ({"hook_points": [RESID], "layer": 1}, "both"),
        ({"hook_points": None, "layer": 99}, "layer must be in"),
        ({"hook_points": None, "layer": 1, "component": "soul"}, "component must be one of"),
        ({"texts": "one string"}, "iterable of documents"),
        ({"texts": []}, "at least one document"),
    ],
)
def test_bad_arguments(toy: lm.LanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        make(toy, None, **options)


def test_progress_is_drawn_only_when_asked_for(toy: lm.LanguageModel, tmp_path: Path, capsys) -> None:
    make(toy, tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    make(toy, tmp_path / "b", progress=True, max_samples=100)
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err
    assert "100 tokens" in textwrap.shorten(err, 1000)
