"""Which texts are worth their activations: cleaning, repetitions, diversity."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxsae.data.statistics import Moments

if TYPE_CHECKING:
    from mlxsae.lm import LanguageModel

OUTLIERS = 0.001
"""Share of tokens, those of the largest norm, that no score counts: attention sinks and their like."""
_WARM_UP_TOKENS = 4096
_SHINGLE, _HASH_BITS = 3, 64


def prepare_dataset(
    raw_texts: Iterable[str], min_len: int = 50, max_len: int = 512, *, near: bool = False
) -> list[str]:
    """Texts stripped of surrounding white space, at least ``min_len`` characters long, cut to ``max_len``, each once
    (``near``: also without near repetitions, see :class:`Duplicates`), in their order.
    """
    if not 0 <= min_len <= max_len:
        raise ValueError(f"[prepare_dataset] 0 <= min_len <= max_len must hold but got {min_len}, {max_len}.")
    if isinstance(raw_texts, str):
        raise ValueError("[prepare_dataset] raw_texts must be an iterable of texts but got one str.")
    seen = Duplicates(near=near)
    cut = (text.strip()[:max_len].rstrip() for text in raw_texts)
    return [text for text in cut if len(text) >= min_len and not seen.add(text)]


class Duplicates:
    """Remembers texts, 16 bytes each (``near``: and about 100 more), and tells repetitions.

    Exact: equal after Unicode NFKC, case folding and collapsing white space. Near: their simhashes differ in at most
    ``distance`` of 64 bits (Charikar 2002; Manku, Jain and Das Sarma 2007 for 3 bits): each shingle of three
    neighbouring words votes on every bit. Candidates come from ``distance + 1`` tables, each keyed by its own part of
    the hash: of that many parts ``distance`` bits leave one untouched.
    """

    def __init__(self, *, near: bool = False, distance: int = 3) -> None:
        if not 0 <= distance < 16:
            raise ValueError(f"[Duplicates] distance must be in [0, 16) but got {distance}.")
        self._seen: set[bytes] = set()
        self._distance = distance
        cuts = np.linspace(0, _HASH_BITS, distance + 2).astype(int).tolist()
        self._parts = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(cuts)]
        self._tables: list[dict[int, list[int]]] | None = [{} for _ in self._parts] if near else None

    def add(self, text: str) -> bool:
        """Whether ``text`` repeats an earlier one; from now on it is one itself, if it does not."""
        words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        key = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._seen:
            return True
        if self._tables is not None:
            value = simhash(words)
            keys = [(value >> low) & mask for low, mask in self._parts]
            for table, k in zip(self._tables, keys, strict=True):
                if any((value ^ other).bit_count() <= self._distance for other in table.get(k, ())):
                    return True
            for table, k in zip(self._tables, keys, strict=True):
                table.setdefault(k, []).append(value)
        self._seen.add(key)
        return False


def simhash(text: str) -> int:
    """64 bits, alike for texts that share most of their shingles of three words (of all words, if fewer)."""
    words = re.findall(r"\w+", text)
    shingles = {" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}
    hashes = b"".join(
        hashlib.blake2b(s.encode("utf-8", "surrogatepass"), digest_size=8).digest() for s in shingles
    )
    votes = np.unpackbits(np.frombuffer(hashes, np.uint8)).reshape(-1, _HASH_BITS)
    majority = 2 * votes.sum(axis=0, dtype=np.int64) > len(votes)
    return int.from_bytes(np.packbits(majority).tobytes())


class _Scored(NamedTuple):
    score: float
    tokens: int
    text: str


def select_texts(
    lm: LanguageModel,
    texts: Iterable[str],
    hook_point: Any,
    *,
    max_tokens: int,
    metric: str | None = "activation_variance",
    deduplicate: bool | str = True,
    candidates: float = 4.0,
    context_size: int = 256,
    batch_size: int = 16,
) -> list[str]:
    """The texts, of those that ``candidates * max_tokens`` tokens take, whose activations vary most.

    The score of a text (``metric="activation_variance"``) is the mean over its tokens, the first ``context_size``,
    of ``|(x - mu) / sigma|^2 / d``, with mean and standard deviation of each dimension over all candidates up to
    and including the text's batch (the first batches wait until 4,096 tokens are known). Tokens whose norm is among
    the largest 0.1 % so far count neither for the score nor for ``mu`` and ``sigma``. Padding, BOS and special
    tokens never do.

    As scores depend on length, texts compete with those of like length only: each bucket ``[2^i, 2^(i+1))`` of tokens
    keeps its best, up to its share of the candidates' tokens.

    Parameters
    ----------
    deduplicate : True, "near" or False, see :class:`Duplicates`.

    Returns
    -------
    list of str
        In their order; together at most ``max_tokens`` tokens, counted to their ends, but at least one text. The first
        ones that fit where ``metric`` is None.
    """
    if metric not in ("activation_variance", None):
        raise ValueError(f"[curate] diversity_metric must be activation_variance or None but got {metric!r}.")
    if deduplicate not in (True, False, "near"):
        raise ValueError(f"[curate] deduplicate must be True, False or 'near' but got {deduplicate!r}.")
    if max_tokens < 1 or candidates < 1:
        raise ValueError(
            f"[curate] max_samples and candidates must be at least 1 but got {max_tokens} and {candidates}."
        )
    if metric is None:
        candidates = 1.0
    unique = _unique(texts, deduplicate)
    scored = list(
        _score(
            lm, unique, lm.hook_point(hook_point), metric, candidates * max_tokens, context_size, batch_size
        )
    )
    if not scored:
        raise ValueError("[curate] source must hold at least one text but has none.")
    return _first(scored, max_tokens) if metric is None else _best(scored, max_tokens)


def _unique(texts: Iterable[str], deduplicate: bool | str) -> Iterator[str]:
    texts = (text for text in texts if text.strip())
    if not deduplicate:
        return texts
    seen = Duplicates(near=deduplicate == "near")
    return (text for text in texts if not seen.add(text))


def _score(
    lm: LanguageModel,
    texts: Iterator[str],
    hook_point: Any,
    metric: str | None,
    most: float,
    context_size: int,
    batch_size: int,
) -> Iterator[_Scored]:
    from mlxsae.lm import capture, tokenize

    moments: Moments | None = None
    norms = _Quantile()
    waiting: list[tuple[list[tuple[str, int]], np.ndarray, np.ndarray]] = []
    special = lm.special_ids
    seen = looked_at = 0
    while seen < most:
        rows = [(text, lm.encode(text)) for _, text in zip(range(batch_size), texts, strict=False)]
        if not rows:
            break
        # To their ends: so they will be used, however little of them is looked at.
        batch = [(text, sum(i not in special for i in ids)) for text, ids in rows]
        seen += sum(tokens for _, tokens in batch)
        if metric is None:
            yield from (_Scored(0.0, tokens, text) for text, tokens in batch if tokens)
            continue
        tokens, valid = tokenize(lm, [ids for _, ids in rows], max_length=context_size)
        mask = np.array(valid)
        if not mask.any():
            continue
        looked_at += int(mask.sum())
        x = np.array(capture(lm, tokens, hook_point)[hook_point].astype(mx.float32))
        norm = np.linalg.norm(x, axis=-1)
        norms.update(norm[mask])
        moments = moments or Moments(x.shape[-1])
        moments.update(x[mask & (norm <= norms.above(OUTLIERS))])
        waiting.append((batch, x, mask))
        if looked_at >= _WARM_UP_TOKENS:
            for entry in waiting:
                yield from _scores(*entry, moments, norms)
            waiting.clear()
    for entry in waiting:
        assert moments is not None
        yield from _scores(*entry, moments, norms)


def _scores(
    batch: list[tuple[str, int]], x: np.ndarray, mask: np.ndarray, moments: Moments, norms: _Quantile
) -> Iterator[_Scored]:
    known = moments.result()
    sigma = np.sqrt(known.variance)
    sigma[sigma == 0] = np.inf  # a dimension that never moves tells nothing
    z = (x - known.mean.astype(np.float32)) / sigma.astype(np.float32)
    score = np.square(z).mean(axis=-1)
    counts = mask & (np.linalg.norm(x, axis=-1) <= norms.above(OUTLIERS))
    for (text, tokens), row, counted, valid in zip(batch, score, counts, mask, strict=True):
        if valid.any():
            yield _Scored(float(row[counted].mean()) if counted.any() else 0.0, tokens, text)


def _first(scored: list[_Scored], max_tokens: int) -> list[str]:
    ends = itertools.accumulate(entry.tokens for entry in scored)
    return [
        entry.text
        for i, (entry, end) in enumerate(zip(scored, ends, strict=True))
        if end <= max_tokens or not i
    ]


def _best(scored: list[_Scored], max_tokens: int) -> list[str]:
    buckets: dict[int, list[int]] = {}
    for place, entry in enumerate(scored):
        buckets.setdefault(int(math.log2(entry.tokens)), []).append(place)
    total = sum(entry.tokens for entry in scored)
    chosen: list[int] = []
    left: list[int] = []
    for places in buckets.values():
        room = max_tokens * sum(scored[i].tokens for i in places) / total
        for i in sorted(places, key=lambda i: -scored[i].score):
            if scored[i].tokens <= room:
                chosen.append(i)
                room -= scored[i].tokens
            else:
                left.append(i)
    # What the buckets' ends left over goes to the best of the rest.
    room = max_tokens - sum(scored[i].tokens for i in chosen)
    for i in sorted(left, key=lambda i: -scored[i].score):
        if scored[i].tokens <= room or not chosen:
            chosen.append(i)
            room -= scored[i].tokens
    return [scored[i].text for i in sorted(chosen)]


class _Quantile:
    """Upper quantiles of a stream of positive numbers: counts on a logarithmic scale, each bin 0.54 % wide."""

    _PER_OCTAVE, _LOW, _HIGH = 128, -64, 64

    def __init__(self) -> None:
        self._counts = np.zeros((self._HIGH - self._LOW) * self._PER_OCTAVE, np.int64)

    def update(self, values: np.ndarray) -> None:
        with np.errstate(divide="ignore"):
            bins = (np.log2(values.astype(np.float64)) - self._LOW) * self._PER_OCTAVE
        bins = np.clip(
            np.nan_to_num(bins, nan=0.0, posinf=self._counts.size, neginf=0.0), 0, self._counts.size - 1
        )
        self._counts += np.bincount(bins.astype(np.int64), minlength=self._counts.size)

    def above(self, share: float) -> float:
        """A number that at most ``share`` of the values exceed: the upper edge of a bin."""
        over = np.cumsum(self._counts[::-1])[::-1]  # values in this bin or higher
        allowed = share * over[0]
        place = int(
            np.searchsorted(-over, -allowed, side="left")
        )  # first bin that may be dropped with all above
        return 2.0 ** (place / self._PER_OCTAVE + self._LOW)
