"""Where features fire: statistics and top examples of all features in one pass over text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxsae.code import to_slots
from mlxsae.lm import HookPoint, LanguageModel, TokenBatch, capture, valid_rows
from mlxsae.sae import SAE


class Example(NamedTuple):
    """A row of text and how strongly a feature fires on each of its tokens."""

    tokens: np.ndarray  # [t] int32, the valid tokens of the row
    activations: np.ndarray  # [t] float32, 0 where the feature is silent
    peak: int  # position of the largest


class FeatureStatistics(NamedTuple):
    """Of all features at once; ``n_tokens`` valid tokens were seen."""

    n_tokens: int
    fire_rate: np.ndarray  # [d_sae] float64, share of tokens on which the feature fires
    mean: np.ndarray  # [d_sae] float64, mean value where it fires, 0 if it never does
    maximum: np.ndarray  # [d_sae] float32


@dataclass(frozen=True)
class Survey:
    """The codes of all valid tokens of some text. Memory: 8 k bytes a token; where the number of latents varies, k is that
    of the fullest token.
    """

    d_sae: int
    values: np.ndarray  # [n, k] float32
    indices: np.ndarray  # [n, k] uint32
    tokens: np.ndarray  # [n] int32
    row: np.ndarray  # [n] int64: the row that a token stands in, ascending; a row is text without gaps

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def statistics(self) -> FeatureStatistics:
        fired = self.values > 0
        features, values = self.indices[fired], self.values[fired]
        counts = np.bincount(features, minlength=self.d_sae)
        sums = np.bincount(features, values.astype(np.float64), self.d_sae)
        maximum = np.zeros(self.d_sae, np.float32)
        np.maximum.at(maximum, features, values)
        return FeatureStatistics(
            self.n_tokens, counts / max(self.n_tokens, 1), sums / np.maximum(counts, 1), maximum
        )

    def activations(self, feature: int) -> np.ndarray:
        """Value of one feature on each token: float32 [n]."""
        if not 0 <= feature < self.d_sae or feature != int(feature):
            raise ValueError(f"[activations] feature must be an int in [0, {self.d_sae}) but got {feature}.")
        return np.where(self.indices == feature, self.values, 0).sum(axis=1, dtype=np.float32)

    def followers(self, feature: int, threshold: float, *, min_share: float = 0.03) -> dict[int, float]:
        """Tokens that come right after those on which ``feature`` is at least ``threshold``, and how often: shares of
        at least ``min_share``, most frequent first."""
        on = np.flatnonzero((self.activations(feature) >= threshold)[:-1] & (self.row[:-1] == self.row[1:]))
        tokens, counts = np.unique(self.tokens[on + 1], return_counts=True)
        shares = counts / max(counts.sum(), 1)
        return {
            int(tokens[i]): float(shares[i])
            for i in np.argsort(-shares, kind="stable")
            if shares[i] >= min_share
        }

    def contrasts(self, feature: int, n: int, *, seed: int = 0, min_share: float = 0.1) -> list[list[int]]:
        """Beginnings of rows that end in a token on which ``feature`` often fires (at least ``min_share`` of its
        firings), but here does not: the same word in another meaning. At most ``n``, chosen at random; token ids
        without special tokens.
        """
        fires = self.activations(feature) > 0
        tokens, counts = np.unique(self.tokens[fires], return_counts=True)
        usual = tokens[counts >= min_share * max(counts.sum(), 1)]
        places = np.flatnonzero(np.isin(self.tokens, usual) & ~fires)
        chosen = np.random.default_rng(seed).permutation(places)[:n]
        starts = np.searchsorted(self.row, self.row[chosen])
        return [self.tokens[a : b + 1].tolist() for a, b in zip(starts, chosen, strict=True)]

    def top_examples(self, feature: int, n: int = 5, *, distinct: bool = True) -> list[Example]:
        """The rows on which ``feature`` fires most strongly, strongest first, at most ``n``.

        With ``distinct``, rows that show the feature in the same words (peak token and the three before it) as a
        stronger one are passed over, unless there are not enough others.
        """
        activations = self.activations(feature)
        starts = np.flatnonzero(np.diff(self.row, prepend=-1))
        ends = np.append(starts[1:], self.n_tokens)
        peaks = np.maximum.reduceat(activations, starts) if len(starts) else np.empty(0)
        order = [r for r in np.argsort(-peaks, kind="stable") if peaks[r] > 0]
        chosen: list[int] = []
        repeated: list[int] = []
        seen: set[tuple[int, ...]] = set()
        for r in order:
            if len(chosen) == n:
                break
            peak = starts[r] + int(np.argmax(activations[starts[r] : ends[r]]))
            words = tuple(self.tokens[max(starts[r], peak - 3) : peak + 1])
            if distinct and words in seen:
                if len(repeated) < n:
                    repeated.append(r)
                continue
            seen.add(words)
            chosen.append(r)
        chosen = sorted(chosen + repeated[: n - len(chosen)], key=lambda r: (-peaks[r], r))
        return [
            Example(
                self.tokens[starts[r] : ends[r]],
                activations[starts[r] : ends[r]],
                int(np.argmax(activations[starts[r] : ends[r]])),
            )
            for r in chosen
        ]


def survey(lm: LanguageModel, sae: SAE, hook_point: HookPoint, batches: Iterable[TokenBatch]) -> Survey:
    """The codes that ``sae`` gives to the valid tokens of ``batches`` at ``hook_point``; it sees no other token.

    A row of the survey is a row of a batch. Where tokens that are not valid stand inside, such as BOS between documents, it
    is cut into several.

    Raises
    ------
    ValueError
        No valid token.
    """
    hook_point = lm.hook_point(hook_point)
    values, indices, kept, rows = [], [], [], []
    row = 0
    for tokens, valid in batches:
        where = np.array(valid)
        if not where.any():
            continue
        x = capture(lm, tokens, hook_point)[hook_point]
        code = to_slots(sae.encode(valid_rows(x, valid)))
        mx.eval(code)
        values.append(np.array(code.values.astype(mx.float32)))
        indices.append(np.array(code.indices))
        kept.append(np.array(tokens)[where])
        begins = where & ~np.pad(where[:, :-1], ((0, 0), (1, 0)))
        rows.append(row + np.cumsum(begins)[where.reshape(-1)] - 1)
        row += int(begins.sum())
    if not kept:
        raise ValueError("[survey] there must be at least one valid token but there is none.")
    width = max(
        part.shape[1] for part in values
    )  # where the number of latents varies, so does that of the slots
    all_values, all_indices = (
        np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
        for parts in (values, indices)
    )
    return Survey(sae.d_sae, all_values, all_indices, np.concatenate(kept), np.concatenate(rows))
