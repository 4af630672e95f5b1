"""Text from files and hubs, and batches of tokens made of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .language_model import LanguageModel

SUFFIXES = (".json", ".jsonl", ".txt")
_SHUFFLE_DOCUMENTS = 10_000


class TokenBatch(NamedTuple):
    """Tokens and which of them are text; unpacks as `tokens, valid = batch`."""

    tokens: mx.array  # [b, t] int32
    valid: mx.array  # [b, t] bool: false at padding, BOS, separators and other special tokens


def read_texts(source: str | os.PathLike[str], text_field: str | None = None) -> Iterator[str]:
    """The documents of `source`, one after the other; blank ones are left out.

    Parameters
    ----------
    source : str or path
        A file: `.json` (a list of strings or of objects), `.jsonl` (one of either per line), `.txt`
        (documents are separated by blank lines). A folder: its files of these kinds, by name. Otherwise the
        name of a Hugging Face dataset, `name` or `name:config`, whose "train" split is streamed; needs the
        package `datasets`.
    text_field : str, optional
        Where an object keeps its text; "text" by default.

    Raises
    ------
    FileNotFoundError
        No such file, or a folder without text files.
    ValueError
        A file of another kind or that does not parse (says where), an object without the field (lists those
        it has), or no document at all.
    ImportError
        A dataset's name, and `datasets` is not installed.

    Files are checked when their turn comes; the first document is read before this function returns.
    """
    name = os.fspath(source)
    if not name:  # Path("") would be the working directory
        raise FileNotFoundError("[read_texts] source must be a file, a folder or a name but is empty.")
    path = Path(name).expanduser()
    field = text_field or "text"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise FileNotFoundError(
                f"[read_texts] folder must hold {', '.join(SUFFIXES)} files but {name!r} has none."
            )
        documents = itertools.chain.from_iterable(_read_file(file, field) for file in files)
    elif path.is_file():
        documents = _read_file(path, field)
    elif (
        path.suffix.lower() in SUFFIXES
        or path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
    ):
        raise FileNotFoundError(f"[read_texts] source must exist but there is no {name!r}.")
    else:
        documents = _read_hub(name, field)

    documents = (text for text in documents if text.strip())
    first = next(documents, None)
    if first is None:
        raise ValueError(f"[read_texts] source must hold at least one document but {name!r} is empty.")
    return itertools.chain((first,), documents)


class Documents:
    """The documents of `source`, walked through as often as it allows.

    Parameters
    ----------
    source : str, path or iterable
        What `read_texts` reads, anew on every walk; or strings, or objects (rows of a dataset) with a text.
    text_field : str, optional
        Where an object keeps its text; "text" by default.
    """

    def __init__(self, source: str | os.PathLike[str] | Iterable[Any], text_field: str | None = None) -> None:
        if not isinstance(source, (str, os.PathLike, Iterable)):
            raise TypeError(
                "[Documents] source must be a path, a name on the hub or an iterable of documents but got "
                f"{type(source).__name__}."
            )
        if isinstance(source, Mapping) or hasattr(source, "columns"):  # walking through it gives its names
            names = ", ".join(map(str, itertools.islice(source, 8)))  # type: ignore[arg-type]
            raise TypeError(
                "[Documents] source must be an iterable of documents but got a "
                f"{type(source).__name__}; take one of its splits or columns: {names}."
            )
        self._source, self._field = source, text_field
        self.once = not isinstance(source, (str, os.PathLike)) and iter(source) is source

    def __iter__(self) -> Iterator[str]:
        if isinstance(self._source, (str, os.PathLike)):
            return read_texts(self._source, self._field)
        field = self._field or "text"
        return (_text_of(entry, field, f"entry {i} of the dataset") for i, entry in enumerate(self._source))


def _text_of(entry: Any, field: str, where: str) -> str:
    text = entry.get(field) if isinstance(entry, dict) else entry
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as e:  # JSON can spell half of a surrogate pair, and no tokenizer takes it
            raise ValueError(
                f"[read_texts] {where} must be Unicode but holds the lone surrogate {text[e.start]!r}."
            ) from e
        return text
    if isinstance(entry, dict):
        fields = ", ".join(key for key, value in entry.items() if isinstance(value, str)) or "none"
        raise ValueError(f"[read_texts] {where} must have a string {field!r}; its string fields: {fields}.")
    raise ValueError(f"[read_texts] {where} must be a string or an object but is {type(entry).__name__}.")


def _read_file(path: Path, field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"[read_texts] file must be one of {', '.join(SUFFIXES)} but got {str(path)!r}.")
    try:
        with path.open(encoding="utf-8-sig") as f:
            if suffix == ".json":
                entries = json.load(f)
                if not isinstance(entries, list):
                    raise ValueError(
                        f"[read_texts] {str(path)!r} must hold a list but holds {type(entries).__name__}."
                    )
                for i, entry in enumerate(entries):
                    yield _text_of(entry, field, f"entry {i} of {str(path)!r}")
            elif suffix == ".jsonl":
                for i, line in enumerate(f, 1):
                    if line.strip():
                        yield _text_of(_json_line(line, path, i), field, f"line {i} of {str(path)!r}")
            else:
                for blank, lines in itertools.groupby(f, key=lambda line: not line.strip()):
                    if not blank:
                        yield "".join(lines).strip()
    except UnicodeDecodeError as e:
        raise ValueError(f"[read_texts] {str(path)!r} must be UTF-8 but is not: {e}.") from e
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"[read_texts] {str(path)!r} must be JSON but is damaged: {e}.") from e


def _json_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(
            f"[read_texts] line {number} of {str(path)!r} must be JSON but is damaged: {e}."
        ) from e


def _read_hub(name: str, field: str) -> Iterator[str]:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as e:
        raise ImportError(
            f"[read_texts] {name!r} is no file or folder here; to read it as a Hugging Face dataset, "
            "`datasets` must be installed: pip install datasets."
        ) from e
    try:
        path, _, config = name.partition(":")
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
    except Exception as e:
        raise ValueError(
            f"[read_texts] {name!r} must be a file, a folder or a Hugging Face dataset with a 'train' split "
            f"but there is no such file and the hub gave: {str(e)[:400]}"
        ) from e
    return (_text_of(row, field, f"row {i} of {name!r}") for i, row in enumerate(rows))


def tokenize(
    lm: LanguageModel, texts: str | Sequence[str] | Sequence[Sequence[int]], *, max_length: int | None = None
) -> TokenBatch:
    """One row per text: BOS where the tokenizer has one, the text, padding on the right.

    Parameters
    ----------
    lm : LanguageModel
    texts : str, list of str, or list of token ids
        Ids are taken as they are, without BOS.
    max_length : int, optional
        Cut longer rows to so many tokens, BOS included.

    Returns
    -------
    TokenBatch
        tokens int32 [b, t] and valid bool [b, t] where t is the longest row's length.
    """
    rows = [
        lm.encode(text) if isinstance(text, str) else list(text)
        for text in ([texts] if isinstance(texts, str) else texts)
    ]
    if max_length is not None and max_length < 1:
        raise ValueError(f"[tokenize] max_length must be at least 1 but got {max_length}.")
    rows = [row[:max_length] for row in rows]
    if not rows or not all(rows):
        raise ValueError("[tokenize] texts must hold at least one text, each of at least one token.")
    return _batch(rows, max(map(len, rows)), lm.special_ids)


def batches_by_length(
    lm: LanguageModel, texts: Sequence[str] | Sequence[Sequence[int]], *, batch_size: int
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Prompts in batches of like lengths, shortest first, so that little is padded.

    Yields
    ------
    (list of int, TokenBatch)
        Places in `texts` of the batch's rows, and the rows as `tokenize` makes them.
    """
    if batch_size < 1:
        raise ValueError(f"[batches_by_length] batch_size must be at least 1 but got {batch_size}.")
    if isinstance(texts, str):
        raise ValueError("[batches_by_length] texts must be a list of texts but got one str.")
    rows = [lm.encode(text) if isinstance(text, str) else list(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        yield places, tokenize(lm, [rows[i] for i in places])


def _batch(rows: list[list[int]], width: int, special_ids: frozenset[int]) -> TokenBatch:
    tokens = np.zeros((len(rows), width), np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    valid &= ~np.isin(tokens, sorted(special_ids))
    return TokenBatch(mx.array(tokens), mx.array(valid))


def in_heldout(text: str, heldout_fraction: float = 0.1) -> bool:
    """Whether a document belongs to the held-out part: a property of its text, so copies never cross over."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < heldout_fraction * 2**64


def token_batches(
    lm: LanguageModel,
    texts: Iterable[str],
    *,
    context_size: int,
    batch_size: int,
    max_tokens: int | None = None,
    split: str | None = None,
    heldout_fraction: float = 0.1,
    seed: int | None = None,
    epochs: int | None = 1,
) -> Iterator[TokenBatch]:
    """Batches of packed rows of tokens, with a mask of what is text.

    Documents are laid end to end, each after a BOS (after an EOS where the tokenizer has no BOS), and cut
    into rows of `context_size`. Every row begins with BOS where there is one, as models that attend to their
    first token need; a row that takes up a document in its middle gets a BOS of its own, and its first dozen
    tokens are harder to predict than they were in their place. No text is lost; only the last row is padded.

    Parameters
    ----------
    lm : LanguageModel
    texts : iterable of str
        Documents. Something that can be walked again, such as a list, where `epochs` is not 1.
    context_size, batch_size : int
        Length of a row, rows of a batch; the last batch may have fewer.
    max_tokens : int, optional
        End after so many valid tokens, exactly: what is over in the last batch is marked invalid.
    split : "train", "heldout" or None
        A part of the documents: each belongs to one of the two by a hash of its text alone, whatever the
        order or the source. None takes all.
    heldout_fraction : float
        Share of the documents held out.
    seed : int, optional
        Shuffle the documents, in a buffer of 10,000, otherwise they come in the order given.
    epochs : int or None
        Walks through the texts, each shuffled differently; None goes on until `max_tokens`.

    Yields
    ------
    TokenBatch
        tokens int32 [b, context_size], valid bool [b, context_size].

    Raises
    ------
    ValueError
        Bad sizes, or no document in the split; where `epochs` is None, none with a token that is not special,
        which would be walked through for ever.
    """
    if context_size < 2 or batch_size < 1:
        raise ValueError(
            "[token_batches] context_size must be >= 2 and batch_size >= 1 "
            f"but got {context_size} and {batch_size}."
        )
    if split not in (None, "train", "heldout"):
        raise ValueError(f"[token_batches] split must be 'train', 'heldout' or None but got {split!r}.")
    if not 0 <= heldout_fraction <= 1:
        raise ValueError(f"[token_batches] heldout_fraction must be in [0, 1] but got {heldout_fraction}.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"[token_batches] max_tokens must be at least 1 but got {max_tokens}.")
    if isinstance(texts, str):
        raise ValueError("[token_batches] texts must be an iterable of documents but got one str.")
    if epochs is None and max_tokens is None:
        raise ValueError("[token_batches] epochs=None must come with max_tokens, or it would never end.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"[token_batches] epochs must be at least 1 but got {epochs}.")
    if epochs != 1 and iter(texts) is texts:
        raise ValueError("[token_batches] texts must be a list, not an iterator, where epochs is not 1.")

    def documents() -> Iterator[list[int]]:
        special = lm.special_ids
        for epoch in itertools.count() if epochs is None else range(epochs):
            part = (
                text
                for text in texts
                if text.strip()
                and (split is None or in_heldout(text, heldout_fraction) == (split == "heldout"))
            )
            if seed is not None:
                part = _shuffled(part, random.Random(f"{seed}/{epoch}"))
            first = next(part, None)
            if first is None:
                raise ValueError(
                    f"[token_batches] texts must hold at least one document in split {split!r} "
                    f"(heldout_fraction {heldout_fraction}) but hold none."
                )
            is_text = False
            for text in itertools.chain((first,), part):
                ids = lm.encode(text, bos=False)
                is_text = is_text or not special.issuperset(ids)
                yield ids
            if epochs is None and not is_text:
                raise ValueError(
                    "[token_batches] texts must hold at least one token that is not special (such as the unknown "
                    f"token) but hold none in split {split!r}."
                )

    return _batches(lm, documents(), context_size, batch_size, max_tokens)


def _shuffled(texts: Iterable[str], rng: random.Random) -> Iterator[str]:
    buffer: list[str] = []
    for text in texts:
        buffer.append(text)
        if len(buffer) == _SHUFFLE_DOCUMENTS:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def _rows(lm: LanguageModel, documents: Iterable[list[int]], context_size: int) -> Iterator[list[int]]:
    bos = lm.bos_id
    start = [] if bos is None else [bos]
    # Without a BOS the documents are told apart by an EOS, as in the text that such models were trained on.
    separator = start or sorted(lm.eos_ids)[:1]
    row = list(start)
    for ids in documents:
        if len(row) > len(start):
            row += separator
        at = 0
        while len(row) + len(ids) - at >= context_size:
            upto = at + context_size - len(row)
            yield row + ids[at:upto]
            at, row = upto, list(start)
        row += ids[at:]
    if len(row) > len(start):
        yield row


def _batches(
    lm: LanguageModel,
    documents: Iterable[list[int]],
    context_size: int,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[TokenBatch]:
    special_ids = lm.special_ids
    rows = _rows(lm, documents, context_size)
    left = max_tokens
    while batch := list(itertools.islice(rows, batch_size)):
        tokens, valid = _batch(batch, context_size, special_ids)
        if left is not None:
            flat = np.array(valid).reshape(-1)
            flat &= np.cumsum(flat) <= left
            left -= int(flat.sum())
            valid = mx.array(flat.reshape(valid.shape))
        yield TokenBatch(tokens, valid)
        if left == 0:
            return


def valid_rows(activation: mx.array, valid: mx.array) -> mx.array:
    """The activations of valid tokens: [b, t, d] and bool [b, t] to [n, d], row after row."""
    if activation.shape[:-1] != valid.shape or valid.dtype != mx.bool_:
        raise ValueError(
            f"[valid_rows] valid must be bool of shape {activation.shape[:-1]} "
            f"but got {valid.dtype} of shape {valid.shape}."
        )
    kept = np.flatnonzero(np.array(valid))
    return mx.take(activation.reshape(-1, activation.shape[-1]), mx.array(kept, dtype=mx.uint32), axis=0)


def without_outliers(activation: mx.array, valid: mx.array, *, times_median: float = 10.0) -> mx.array:
    """`valid` less the tokens whose activation is out of all proportion, as at attention sinks.

    Parameters
    ----------
    activation : [b, t, d]
    valid : bool [b, t]
    times_median : float
        How many times the median norm of the valid tokens of this very batch is too much.

    Returns
    -------
    bool [b, t]
    """
    if not times_median > 1:
        raise ValueError(f"[without_outliers] times_median must be over 1 but got {times_median}.")
    norms = np.array(mx.linalg.norm(activation.astype(mx.float32), axis=-1))
    mask = np.array(valid)
    known = norms[mask & ~np.isnan(norms)]
    if not known.size:
        return valid
    # A norm that is NaN is kept: it must be seen.
    return mx.array(mask & ~(norms > times_median * np.median(known)))
