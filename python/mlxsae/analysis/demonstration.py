"""Find a steering that shows: one feature, one prompt, a continuation that changes and stays fluent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxsae.analysis.steering import steer
from mlxsae.lm import HookPoint, LanguageModel, only_at, splice, stream_generate, token_losses
from mlxsae.sae import SAE


class Candidate(NamedTuple):
    """A feature to try: its typical value where it fires, the tokens that follow it there, and prompts."""

    typical: float
    followers: Sequence[int]
    prompts: Sequence[Sequence[int]]  # token ids with their BOS


class Steering(NamedTuple):
    """What :func:`find_steering` chose. The feature was set to ``strength`` at the prompt's last token only."""

    feature: int
    strength: float
    prompt: str
    before: str
    after: str
    fluency: float  # log-probability of the least likely token of `after` but its first, unsteered


class _Change(NamedTuple):
    merit: float  # gain in probability of the followers, and how thinkable the new word was before
    feature: int
    strength: float
    prompt: Sequence[int]


def find_steering(
    lm: LanguageModel,
    sae: SAE,
    hook_point: HookPoint,
    candidates: Mapping[int, Candidate],
    *,
    multiples: Sequence[float] = (1.0, 2.0, 4.0),
    max_tokens: int = 12,
    tries: int = 10,
    min_gain: float = 0.5,
) -> Steering | None:
    """The most convincing change among ``candidates`` ``{feature: candidate}``; None if nothing changes.

    Each feature is set to multiples of its typical value at the last token of each of its prompts, as a delta. A
    change counts where the likeliest next token becomes one of the feature's followers and these gain
    ``min_gain`` in probability. Of the ``tries`` best, one to a feature before a second of any, the
    continuations are generated greedily. That one wins which the *unsteered* model finds most thinkable, by the
    changed token and the least likely one after it, and which changes most tokens. So the change is what the
    feature means, has a fluent consequence and is no accident of a broken model.
    """
    hook_point = lm.hook_point(hook_point)
    found: list[_Change] = []
    for feature, candidate in candidates.items():
        found += _changes(lm, sae, hook_point, feature, candidate, multiples, min_gain)
    found.sort(key=lambda change: -change.merit)
    best: tuple[float, Steering] | None = None
    for merit, feature, strength, ids in _varied(found)[:tries]:
        prompt = list(ids)
        edit = {hook_point: steer(sae, {feature: strength}, mode="set")}
        before = [t.token for t in stream_generate(lm, prompt, max_tokens=max_tokens)]
        after = [
            t.token for t in stream_generate(lm, prompt, max_tokens=max_tokens, edits=edit, positions=[-1])
        ]
        fluency = _fluency(lm, prompt, after)
        different = sum(a != b for a, b in zip(before, after, strict=False))
        score = merit + 0.5 * fluency + 0.2 * different
        if best is None or score > best[0]:
            text, said = _joined(lm, prompt, before)
            best = score, Steering(feature, strength, text, said, _joined(lm, prompt, after)[1], fluency)
    return best[1] if best else None


def _changes(
    lm: LanguageModel,
    sae: SAE,
    hook_point: HookPoint,
    feature: int,
    candidate: Candidate,
    multiples: Sequence[float],
    min_gain: float,
) -> list[_Change]:
    """The changes that count of one feature, with as little force as makes each."""
    typical, followers, prompts = candidate
    if not followers or not prompts:
        return []
    width = max(map(len, prompts))
    # Causal attention: the padding after a prompt changes nothing before it.
    tokens, last = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        last[i, len(prompt) - 1] = True
    batch, where, wanted = mx.array(tokens), mx.array(last.tolist()), sorted(set(followers))
    plain = _next_tokens(lm, batch, last)
    changes: dict[int, _Change] = {}
    for multiple in multiples:
        strength = multiple * typical
        with splice(lm, {hook_point: only_at(steer(sae, {feature: strength}, mode="set"), where)}):
            steered = _next_tokens(lm, batch, last)
        gain = steered[:, wanted].sum(axis=1) - plain[:, wanted].sum(axis=1)
        new = steered.argmax(axis=1)
        counts = (gain >= min_gain) & np.isin(new, wanted) & (new != plain.argmax(axis=1))
        for i in np.flatnonzero(counts):
            merit = float(gain[i]) + 0.5 * math.log(max(float(plain[i, new[i]]), 1e-12))
            changes.setdefault(int(i), _Change(merit, feature, strength, prompts[int(i)]))
    return list(changes.values())


def _varied(found: list[_Change]) -> list[_Change]:
    """The same, but the best of every feature before the second best of any."""
    seen: dict[int, int] = {}
    ranked = []
    for change in found:
        seen[change.feature] = seen.get(change.feature, 0) + 1
        ranked.append((seen[change.feature], change))
    return [change for _, change in sorted(ranked, key=lambda pair: pair[0])]


def _next_tokens(lm: LanguageModel, tokens: mx.array, last: np.ndarray) -> np.ndarray:
    """Probabilities [b, vocab] of the token after the marked one of each row."""
    at = mx.array(last.argmax(axis=1).tolist())
    logits = lm(tokens)[mx.arange(len(last)), at]
    return np.array(mx.softmax(logits.astype(mx.float32), axis=-1))


def _fluency(lm: LanguageModel, prompt: list[int], new: list[int]) -> float:
    """Log-probability of the continuation's least likely token after its first."""
    if len(new) < 2:
        return -math.inf
    return -float(np.array(token_losses(lm, mx.array([prompt + new], mx.int32))[0, len(prompt) :]).max())


def _joined(lm: LanguageModel, prompt: list[int], new: list[int]) -> tuple[str, str]:
    """Prompt and continuation as texts that join: a decoder drops the space before a text's first word."""
    text = [t for t in prompt if t not in lm.special_ids]
    whole, head = lm.decode(text + new), lm.decode(text)
    return (head, whole[len(head) :]) if whole.startswith(head) else (head, lm.decode(new))
