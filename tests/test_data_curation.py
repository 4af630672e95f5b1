"""Choosing texts: cleaning, repetitions, and the diversity score against its definition."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_toys import write_folder
from mlxsae import data, lm
from mlxsae.data import ActivationDataset, curation
from mlxsae.data.curation import Duplicates, select_texts, simhash

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> lm.LanguageModel:
    return lm.load(write_folder(tmp_path_factory.mktemp("models") / "toy"))


def sentences(n: int, seed: int = 0, words: tuple[int, int] = (3, 12)) -> list[str]:
    rng = random.Random(seed)
    vocabulary = [
        "the",
        "old",
        "red",
        "hen",
        "ran",
        "home",
        "sad",
        "Fox",
        "dug",
        "holes",
        "all",
        "day",
        "Quick",
        "zebra",
    ]
    return [" ".join(rng.choices(vocabulary, k=rng.randint(*words))) + "." for _ in range(n)]


# ---- cleaning


@given(st.lists(st.text("ab \n", max_size=12), max_size=30), st.integers(0, 4), st.integers(4, 8))
def test_prepared_texts_obey_what_was_asked(texts: list[str], least: int, most: int) -> None:
    found = data.prepare_dataset(texts, least, most)
    assert all(least <= len(text) <= most and text == text.strip() for text in found)
    keys = [" ".join(text.split()) for text in found]
    assert len(set(keys)) == len(keys)
    possible = [text.strip()[:most].rstrip() for text in texts]
    assert set(keys) == {" ".join(text.split()) for text in possible if len(text) >= least}
    assert found == sorted(found, key=possible.index)


def test_prepare_dataset_by_example() -> None:
    raw = ["  short ", "x" * 60, " " + "x" * 60, "X" * 60, "y" * 600, "y" * 700, "ﬁne " * 20, "FINE " * 20]
    assert data.prepare_dataset(raw) == ["x" * 60, "y" * 512, ("ﬁne " * 20).strip()]
    for bad in (("a string",), (["a"], 10, 5)):
        with pytest.raises(ValueError, match="prepare_dataset"):
            data.prepare_dataset(*bad)


def test_preparing_is_linear() -> None:
    """The list that is searched for each text takes minutes at this size."""
    texts = [f"text number {i} is long enough to be kept by the defaults, as you see" for i in range(50_000)]
    assert len(data.prepare_dataset(texts + texts)) == 50_000


# ---- repetitions


def test_near_repetitions_are_found_and_others_are_not() -> None:
    rng = random.Random(1)
    words = [f"word{i}" for i in range(3000)]
    originals = [rng.choices(words, k=400) for _ in range(200)]
    near = Duplicates(near=True)
    assert not any(near.add(" ".join(text)) for text in originals)
    changed = []
    for text in originals:
        copy = list(text)
        copy[rng.randrange(len(copy))] = "changed"
        changed.append(" ".join(copy).upper() + " !")
    assert sum(near.add(text) for text in changed) > 150  # 3 of 398 shingles differ
    assert not any(near.add(" ".join(rng.choices(words, k=400))) for _ in range(200))
    exact = Duplicates()
    assert not any(exact.add(" ".join(text)) for text in originals)
    assert not any(exact.add(text) for text in changed)
    assert all(exact.add("  ".join(text).title()) for text in originals)


@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=6), st.integers(0, 5))
def test_the_tables_find_every_hash_within_the_distance(value: int, flips: set[int], distance: int) -> None:
    found = Duplicates(near=True, distance=distance)
    other = value
    for bit in flips:
        other ^= 1 << bit
    hashes = iter((value, other))
    original = curation.simhash
    curation.simhash = lambda text: next(hashes)
    try:
        assert not found.add("one")
        assert found.add("two") == (len(flips) <= distance)
    finally:
        curation.simhash = original


def test_simhash_is_alike_for_like_texts() -> None:
    a, b, c = sentences(3, seed=2, words=(300, 300))
    words = a.split()
    words[100] = "other"
    assert (simhash(a) ^ simhash(" ".join(words))).bit_count() <= 6
    assert (simhash(b) ^ simhash(c)).bit_count() > 6
    assert simhash("") == simhash("?")


# ---- diversity


def naive_scores(model: lm.LanguageModel, texts: list[str], batch_size: int) -> list[float]:
    """The definition, with everything seen so far kept and sorted."""
    rows: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    scores: list[float] = []

    def score(per_text: Iterable[np.ndarray]) -> None:
        every = np.concatenate(rows)
        norms = np.linalg.norm(every, axis=1)
        most = np.sort(norms)[::-1][int(0.001 * len(norms))]
        good = every[norms <= most]
        mean, std = good.mean(axis=0), good.std(axis=0)
        for x in per_text:
            x = x[np.linalg.norm(x, axis=1) <= most]
            scores.append(float(np.square((x - mean) / std).mean()))

    for begin in range(0, len(texts), batch_size):
        for text in texts[begin : begin + batch_size]:
            tokens, valid = lm.tokenize(model, text)
            x = np.array(lm.capture(model, tokens, POINT)[lm.HookPoint.parse(POINT)])[np.array(valid)]
            rows.append(x.astype(np.float64))
            waiting.append(rows[-1])
        if sum(map(len, rows)) >= 4096:
            score(waiting)
            waiting.clear()
    score(waiting)
    return scores


def test_scores_are_those_of_the_definition(toy: lm.LanguageModel) -> None:
    texts = sentences(260)
    found = list(
        curation._score(toy, iter(texts), lm.HookPoint.parse(POINT), "activation_variance", 1e9, 256, 16)
    )
    assert [entry.text for entry in found] == texts
    expected = naive_scores(toy, texts, 16)
    # The definition keeps every token's z with what was known then; outliers leave mu and sigma a batch sooner.
    np.testing.assert_allclose([entry.score for entry in found], expected, rtol=0.01)
    assert np.corrcoef([entry.score for entry in found], expected)[0, 1] > 0.999


def test_the_most_diverse_of_each_length_are_kept(toy: lm.LanguageModel) -> None:
    texts = sentences(120)
    everything = {
        entry.text: entry
        for entry in curation._score(
            toy, iter(texts), lm.HookPoint.parse(POINT), "activation_variance", 1e9, 256, 16
        )
    }
    total = sum(entry.tokens for entry in everything.values())
    chosen = select_texts(toy, texts, POINT, max_tokens=total // 3, candidates=1e6)
    used = sum(everything[text].tokens for text in chosen)
    assert 0.9 * total / 3 < used <= total / 3
    assert chosen == sorted(chosen, key=texts.index)
    buckets: dict[int, list[str]] = {}
    for text in everything:
        buckets.setdefault(int(np.log2(everything[text].tokens)), []).append(text)
    assert len(buckets) > 1
    assert max(map(len, buckets.values())) >= 20
    for members in buckets.values():
        kept = [everything[t].score for t in members if t in chosen]
        dropped = [everything[t].score for t in members if t not in chosen]
        assert np.mean(kept) > np.mean(dropped)
        share = sum(everything[t].tokens for t in members if t in chosen) / sum(
            everything[t].tokens for t in members
        )
        assert len(members) < 20 or 0.2 < share < 0.45


def test_monotonous_texts_lose(toy: lm.LanguageModel) -> None:
    """Texts of one letter lie close together; between them and mixed ones of the same length the mixed ones win."""
    rng = random.Random(0)
    dull = [rng.choice("ab") * 20 for _ in range(40)]
    dull = [text + "c" * (i % 3) + "d" * (i // 3 % 3) + "e" * (i // 9) for i, text in enumerate(dull)]
    mixed = ["".join(rng.choices("fghijklmnopqrstuvwxyzABCDEFG", k=20)) for _ in range(10)]
    texts = dull + mixed
    rng.shuffle(texts)
    chosen = select_texts(toy, texts, POINT, max_tokens=250, candidates=100)
    assert sum(text in mixed for text in chosen) >= 0.6 * len(chosen)


@pytest.mark.parametrize("metric", ["activation_variance", None])
def test_long_texts_count_to_their_ends(toy: lm.LanguageModel, metric: str | None) -> None:
    """What is chosen is used whole, however few of its tokens are scored."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(100, 400))) for _ in range(60)]
    size = {text: int(np.array(lm.tokenize(toy, text).valid).sum()) for text in texts}
    chosen = select_texts(toy, texts, POINT, max_tokens=3000, metric=metric, context_size=32)
    assert 2500 < sum(size[text] for text in chosen) <= 3000
    assert len(select_texts(toy, texts, POINT, max_tokens=5, metric=metric, context_size=32)) == 1


def test_without_a_metric_the_first_texts_are_kept(toy: lm.LanguageModel) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(5, 60))) for _ in range(60)]
    chosen = select_texts(toy, texts, POINT, max_tokens=300, metric=None)
    assert chosen == texts[: len(chosen)]
    assert sum(map(len, chosen)) <= 300 < sum(map(len, texts[: len(chosen) + 1]))


def test_curate_end_to_end(toy: lm.LanguageModel, tmp_path: Path) -> None:
    texts = sentences(200)
    options: dict[str, Any] = {"layer": 1, "component": "resid", "max_samples": 600, "context_size": 64}
    made = ActivationDataset.curate(
        toy, [*texts, *texts], min_activation_norm=3.0, cache_dir=tmp_path / "x", **options
    )
    assert 0 < len(made) <= 600
    x = np.array(next(made.batches(10**6)))
    assert np.linalg.norm(x, axis=1).min() >= 3.0
    assert made.metadata["recipe"]["text"]["curated"]["diversity_metric"] == "activation_variance"
    assert len(
        ActivationDataset.curate(toy, texts, cache_dir=tmp_path / "x", min_activation_norm=3.0, **options)
    ) == len(made)
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(texts))
    named = ActivationDataset.curate(toy, path, diversity_metric=None, deduplicate="near", **options)
    assert named.metadata["recipe"]["text"]["source"] == str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "beauty"}, "diversity_metric"),
        ({"deduplicate": "fuzzy"}, "deduplicate"),
        ({"max_tokens": 0}, "max_samples"),
        ({"candidates": 0.5}, "candidates"),
        ({"texts": ["  ", ""]}, "at least one text"),
        ({"texts": ["\u4e00\u4e01", "\u4e02"]}, "at least one text"),  # of unknown tokens alone
    ],
)
def test_bad_arguments(toy: lm.LanguageModel, options: dict[str, Any], message: str) -> None:
    chosen: dict[str, Any] = {"texts": ["a b c"], "max_tokens": 10} | options
    with pytest.raises(ValueError, match=message):
        select_texts(toy, chosen.pop("texts"), POINT, **chosen)


def test_quantiles_of_a_stream() -> None:
    values = np.exp(np.random.default_rng(0).standard_normal(100_000)).astype(np.float32)
    found = curation._Quantile()
    for part in np.array_split(values, 7):
        found.update(part)
    for share in (0.5, 0.1, 0.001):
        over = (values > found.above(share)).mean()
        assert 0.97 * share <= over <= share
    few = curation._Quantile()
    few.update(np.array([1.0, 2.0, 3.0]))
    assert few.above(0.001) >= 3.0
