"""Reading text, and the laws of packed batches."""

from __future__ import annotations

import builtins
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_toys import write_folder
from mlxsae import lm

TEXTS = ["a dog.", "Cats run", "b", "The big old dog ran home?", "x y z"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> lm.LanguageModel:
    return lm.load(write_folder(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory: pytest.TempPathFactory) -> lm.LanguageModel:
    return lm.load(write_folder(tmp_path_factory.mktemp("models") / "toy", bos=False))


# ---- files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(TEXTS)),
        ("a.json", json.dumps([{"text": text, "id": "no"} for text in TEXTS])),
        ("a.JSON", "\ufeff" + json.dumps([*TEXTS, "", "  \n"])),
        ("a.jsonl", "\n".join(json.dumps(text) for text in TEXTS)),
        ("a.jsonl", "\n\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n"),
        ("a.txt", "\n\n".join(TEXTS)),
        ("a.txt", "\n\n\n" + "\r\n \r\n".join(TEXTS) + "\n"),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert list(lm.read_texts(tmp_path / name)) == TEXTS


def test_a_document_of_a_txt_keeps_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    assert list(lm.read_texts(tmp_path / "a.txt")) == ["one\ntwo", "three"]


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.json").write_text('["first"]')
    (tmp_path / "c.jsonl").write_text("")
    (tmp_path / "notes.md").write_text("not text")
    assert list(lm.read_texts(str(tmp_path))) == ["first", "second"]


def test_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"story": "once", "n": 1}\n')
    assert list(lm.read_texts(tmp_path / "a.jsonl", "story")) == ["once"]
    with pytest.raises(ValueError, match=r"line 1 of .* must have a string 'text'; its string fields: story"):
        lm.read_texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[]", "is empty"),
        ("a.json", b'["", "  "]', "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.json", b'{"text": "a"}', "must hold a list but holds dict"),
        ("a.json", b'["a", ', "must be JSON but is damaged"),
        ("a.json", b"[3]", "entry 0 of .* must be a string or an object but is int"),
        ("a.jsonl", b'{"text": ', "line 1 of .* must be JSON but is damaged"),
        ("a.txt", b"\xff\xfe\x00a", "must be UTF-8"),
        ("a.json", b"[" * 100_000, "must be JSON but is damaged"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* must be JSON but is damaged"),
        ("a.json", rb'["a \ud83d b"]', r"entry 0 of .* holds the lone surrogate '\\ud83d'"),
        ("a.jsonl", rb'{"text": "\ude00"}', r"line 1 of .* holds the lone surrogate"),
        ("a.csv", b"a,b", r"file must be one of .json, .jsonl, .txt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        lm.read_texts(tmp_path / name)


def test_a_bad_line_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"fine"\n{"text"\n')
    texts = lm.read_texts(tmp_path / "a.jsonl")
    assert next(texts) == "fine"
    with pytest.raises(ValueError, match=r"line 2 of"):
        next(texts)


def test_an_empty_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.txt").write_text("not asked for")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is empty"):
        lm.read_texts("")


@pytest.mark.parametrize("name", ["absent.json", "/absent", "./absent", "a/b/c", "~/absent.txt"])
def test_a_missing_file(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        lm.read_texts(name)


def test_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has none"):
        lm.read_texts(tmp_path)


def test_hub_names_need_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install datasets"):
        lm.read_texts("someone/stories")


def test_hub_names_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(
        name: str, config: str | None, *, split: str, streaming: bool
    ) -> Iterator[dict[str, str]]:
        if (name, config) not in (("someone/stories", None), ("stories", "small")):
            raise FileNotFoundError("not on the hub")
        assert (split, streaming) == ("train", True)
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(lm.read_texts("someone/stories")) == TEXTS
    assert list(lm.read_texts("stories:small")) == TEXTS
    with pytest.raises(ValueError, match="no such file and the hub gave: not on the hub"):
        lm.read_texts("someone/else")


# ---- tokens


def test_tokenize_pads_on_the_right(toy: lm.LanguageModel) -> None:
    tokens, valid = lm.tokenize(toy, ["ab", "abcd"])
    assert tokens.dtype == mx.int32
    assert tokens.tolist() == [[1, 4, 5, 0, 0], [1, 4, 5, 6, 7]]
    assert valid.tolist() == [[False, True, True, False, False], [False, True, True, True, True]]
    assert lm.tokenize(toy, "abcd", max_length=3).tokens.tolist() == [[1, 4, 5]]
    tokens, valid = lm.tokenize(toy, [[4, 5, 0, 2, 6]])  # ids as they are; <unk> and </s> are no text
    assert tokens.tolist() == [[4, 5, 0, 2, 6]]
    assert valid.tolist() == [[True, True, False, False, True]]
    with pytest.raises(ValueError, match="at least one text"):
        lm.tokenize(toy, [])
    for length in (0, -1):
        with pytest.raises(ValueError, match=f"max_length must be at least 1 but got {length}"):
            lm.tokenize(toy, "abcd", max_length=length)
    with pytest.raises(ValueError, match="list of texts but got one str"):
        next(lm.batches_by_length(toy, "abcd", batch_size=2))


def rows_of(batches: Iterator[lm.TokenBatch]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(np.array(tokens), np.array(valid)) for tokens, valid in batches]
    return np.concatenate([t for t, _ in pairs]), np.concatenate([v for _, v in pairs])


def test_rows_begin_with_bos_and_documents_are_set_apart(toy: lm.LanguageModel) -> None:
    tokens, valid = rows_of(lm.token_batches(toy, ["abc", "de", "fghij"], context_size=6, batch_size=2))
    assert tokens.tolist() == [[1, 4, 5, 6, 1, 7], [1, 8, 1, 9, 10, 11], [1, 12, 13, 0, 0, 0]]
    assert (valid == (tokens > 3)).all()


def test_without_bos_documents_are_set_apart_by_eos(no_bos: lm.LanguageModel) -> None:
    tokens, valid = rows_of(lm.token_batches(no_bos, ["abc", "de"], context_size=5, batch_size=2))
    assert tokens.tolist() == [[4, 5, 6, 2, 7], [8, 0, 0, 0, 0]]
    assert (valid == (tokens > 3)).all()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("ab Z.<s>é", min_size=1, max_size=30), min_size=1, max_size=12).filter(
        lambda texts: any(text.strip() for text in texts)
    ),
    context_size=st.integers(2, 17),
    batch_size=st.integers(1, 5),
    seed=st.none() | st.integers(0, 3),
)
def test_laws_of_packing(
    toy: lm.LanguageModel, texts: list[str], context_size: int, batch_size: int, seed: int | None
) -> None:
    """All text comes out once, in order within each document; nothing special or padded is valid."""

    def run(**more: Any) -> tuple[np.ndarray, np.ndarray]:
        batches = lm.token_batches(
            toy, texts, context_size=context_size, batch_size=batch_size, seed=seed, **more
        )
        return rows_of(batches)

    tokens, valid = run()
    assert tokens.shape == valid.shape == (len(tokens), context_size)
    assert (tokens[:, 0] == 1).all()
    assert not valid[np.isin(tokens, sorted(toy.special_ids))].any()
    expected = [[i for i in toy.encode(text) if i not in toy.special_ids] for text in texts if text.strip()]
    flat = tokens[valid].tolist()
    assert sorted(flat) == sorted(i for ids in expected for i in ids)
    if seed is None:
        assert flat == [i for ids in expected for i in ids]
    again = run()
    assert (tokens == again[0]).all()
    assert (valid == again[1]).all()
    if len(flat) > 1:  # max_tokens is exact, and a prefix
        limited, limited_valid = run(max_tokens=len(flat) // 2)
        assert limited_valid.sum() == len(flat) // 2
        assert limited[limited_valid].tolist() == flat[: len(flat) // 2]
    twice = run(epochs=2)
    assert sorted(twice[0][twice[1]].tolist()) == sorted(flat + flat)
    endless = run(epochs=None, max_tokens=3 * len(flat) + 1) if flat else None
    assert endless is None or endless[1].sum() == 3 * len(flat) + 1


def documents(n: int) -> list[str]:
    letters = "abcdefghij"
    return ["".join(letters[int(c)] for c in str(10_000 + i)) for i in range(n)]


def test_splits_are_disjoint_and_whole(toy: lm.LanguageModel) -> None:
    texts = documents(400)

    def part(split: str | None, texts: list[str] = texts, seed: int | None = None) -> set[str]:
        tokens, _ = rows_of(
            lm.token_batches(toy, texts, context_size=6, batch_size=8, split=split, seed=seed)
        )
        assert (tokens[:, 1:] > 3).all()  # five letters and BOS: one document is one row
        return {toy.decode(row[1:].tolist()) for row in tokens}

    train, heldout = part("train"), part("heldout")
    assert not train & heldout
    assert train | heldout == part(None) == set(texts)
    assert 0.05 < len(heldout) / len(texts) < 0.15
    assert part("heldout", texts[::-1], seed=4) == heldout  # a property of the text alone
    assert {text for text in texts if lm.in_heldout(text)} == heldout


def test_shuffling_depends_on_seed_and_epoch(toy: lm.LanguageModel) -> None:
    texts = documents(50)

    def order(seed: int | None, epochs: int = 1) -> list[list[int]]:
        batches = lm.token_batches(toy, texts, context_size=6, batch_size=8, seed=seed, epochs=epochs)
        return rows_of(batches)[0].tolist()

    assert order(None) != order(0) != order(1)
    assert order(0) == order(0)
    both = order(0, epochs=2)
    assert both[:50] == order(0) != both[50:]
    assert sorted(both[50:]) == sorted(both[:50])


def test_the_shuffle_buffer_is_bounded_and_loses_nothing(
    toy: lm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxsae.lm import text

    monkeypatch.setattr(text, "_SHUFFLE_DOCUMENTS", 7)
    texts, read = documents(60), 0

    def source() -> Iterator[str]:
        nonlocal read
        for document in texts:
            read += 1
            yield document

    batches = lm.token_batches(toy, source(), context_size=6, batch_size=1, seed=3)
    next(batches)
    assert read <= 8
    assert len(list(batches)) == 59


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_size": 1}, "context_size must be >= 2"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"split": "test"}, "split must be"),
        ({"heldout_fraction": 1.5}, r"heldout_fraction must be in \[0, 1\]"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"epochs": None}, "must come with max_tokens"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"texts": "one string"}, "one str"),
        ({"texts": iter(TEXTS), "epochs": 2}, "must be a list, not an iterator"),
    ],
)
def test_bad_arguments(toy: lm.LanguageModel, change: dict[str, Any], message: str) -> None:
    arguments = {"texts": TEXTS, "context_size": 8, "batch_size": 2} | change
    with pytest.raises(ValueError, match=message):
        lm.token_batches(toy, **arguments)


def test_a_source_of_no_documents_is_named() -> None:
    with pytest.raises(
        TypeError, match="source must be a path, a name on the hub or an iterable of documents but got int"
    ):
        lm.Documents(3)  # type: ignore[arg-type]


def test_what_holds_documents_by_name_is_refused(toy: lm.LanguageModel) -> None:
    """Walking through a DatasetDict or a data frame gives the names of its splits or columns."""
    splits = {"train": [{"text": "The big dog"}], "test": [{"text": "The old cat"}]}
    names = ["text", "label"]
    frame_type = type("DataFrame", (), {"columns": names, "__iter__": lambda self: iter(names)})
    with pytest.raises(TypeError, match="got a dict; take one of its splits or columns: train, test"):
        lm.Documents(splits)
    with pytest.raises(TypeError, match=r"got a DataFrame; .* text, label"):
        lm.Documents(frame_type())
    assert list(lm.Documents(splits["train"])) == ["The big dog"]


def test_an_empty_split_is_an_error(toy: lm.LanguageModel) -> None:
    arguments: dict[str, Any] = {"context_size": 8, "batch_size": 2}
    with pytest.raises(ValueError, match="at least one document in split 'heldout'"):
        next(lm.token_batches(toy, TEXTS, split="heldout", heldout_fraction=0.0, **arguments))
    with pytest.raises(ValueError, match="at least one document in split None"):
        next(lm.token_batches(toy, [], **arguments))


def test_text_of_special_tokens_alone_is_an_error(toy: lm.LanguageModel) -> None:
    """Walked through until it fills its tokens, it would be walked through for ever."""
    special = toy.tokenizer.convert_ids_to_tokens(sorted(toy.special_ids))[-1]
    arguments: dict[str, Any] = {"context_size": 8, "batch_size": 2, "max_tokens": 100}
    with pytest.raises(ValueError, match="at least one token that is not special"):
        list(lm.token_batches(toy, [special] * 3, epochs=None, **arguments))
    assert not any(b.valid.any().item() for b in lm.token_batches(toy, [special] * 3, **arguments))


def test_valid_rows(toy: lm.LanguageModel) -> None:
    tokens, valid = lm.tokenize(toy, ["ab", "abcd"])
    x = lm.capture(toy, tokens, "layers.1")[lm.HookPoint(1, "resid_post")]
    rows = lm.valid_rows(x, valid)
    assert np.array_equal(np.array(rows), np.array(x)[np.array(valid)])
    assert lm.valid_rows(x, mx.zeros_like(valid)).shape == (0, x.shape[-1])
    with pytest.raises(ValueError, match="valid must be bool of shape"):
        lm.valid_rows(x, valid[:, :-1])


def test_the_loss_of_a_trained_model_is_the_known_one(shared: Path) -> None:
    """1.494 nats per token on all of these stories, measured apart from this package; here on every 160th's beginning."""
    model = lm.load(shared / "data" / "stories260K")
    texts = list(lm.read_texts(shared / "data" / "text" / "tinystories_val.json"))[::160]
    total = count = 0.0
    for i in range(0, len(texts), 4):
        tokens, valid = lm.tokenize(model, texts[i : i + 4], max_length=256)
        n = valid[:, 1:].sum().item()
        total, count = total + n * lm.loss(model, tokens, valid).item(), count + n
    assert count > 3_000
    assert total / count == pytest.approx(1.494, abs=0.15)


def test_batches_by_length(toy: lm.LanguageModel) -> None:
    texts = ["a" * n for n in (7, 1, 4, 9, 2, 2, 6)]
    seen, lengths = [], []
    for places, batch in lm.batches_by_length(toy, texts, batch_size=3):
        expected = lm.tokenize(toy, [texts[i] for i in places])
        assert all(map(mx.array_equal, batch, expected))
        seen += places
        lengths.append(batch.tokens.shape[1])
    assert sorted(seen) == list(range(7))
    assert lengths == [3, 8, 10]  # BOS included
    ids = [[5, 6], [7]]
    assert [p for p, _ in lm.batches_by_length(toy, ids, batch_size=1)] == [[1], [0]]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(lm.batches_by_length(toy, texts, batch_size=0))
