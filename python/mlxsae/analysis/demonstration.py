"""Find a steering that shows: one feature, one prompt, a continuation that changes and stays fluent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae.analysis.steering import steer
from mlxsae.lm import HookPoint, LanguageModel, generate, only_at, splice, token_losses
from mlxsae.sae import SAE


class Steering(NamedTuple):
    """What :func:`find_steering` chose. The feature was set to ``strength`` at the prompt's last token only."""

    feature: int
    strength: float
    prompt: str
    before: str
    after: str
    fluency: (
        float  # mean log-probability per token of ``after`` under the unsteered model, its first token apart
    )


def find_steering(
    lm: LanguageModel,
    sae: SAE,
    hook_point: HookPoint,
    candidates: Mapping[int, tuple[float, Sequence[int]]],
    prompts: Sequence[Sequence[int]],
    *,
    multiples: Sequence[float] = (1.0, 2.0, 4.0),
    max_tokens: int = 12,
    tries: int = 12,
) -> Steering | None:
    """The most fluent change among ``candidates`` ``{feature: (typical value, tokens that it makes likelier)}``.

    Each feature is set to multiples of its typical value at the last token of each of ``prompts`` (token ids with their
    BOS), as a delta. A change counts where the likeliest next token becomes one of those that the feature is known to
    promote and was not before. Of the ``tries`` surest changes, one to a feature before a second of any, the
    continuations are generated greedily; the one wins whose text after the changed token is likeliest to the *unsteered*
    model, with a small bonus for every word that differs: a fluent consequence, not a broken model. None if nothing
    changes.
    """
    hook_point = lm.hook_point(hook_point)
    if not candidates or not prompts:
        return None
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int32)
    last = np.zeros((len(prompts), width), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        last[i, len(prompt) - 1] = True
    batch, where = mx.array(tokens), mx.array(last)
    # Causal attention: the padding after a prompt changes nothing before it.
    plain = _next_tokens(lm, batch, last)
    found: list[tuple[float, int, float, int]] = []
    for feature, (typical, promoted) in candidates.items():
        for multiple in multiples:
            strength = multiple * typical
            with splice(lm, {hook_point: only_at(steer(sae, {feature: strength}, mode="set"), where)}):
                steered = _next_tokens(lm, batch, last)
            for i in range(len(prompts)):
                new = int(steered[i].argmax())
                if new != int(plain[i].argmax()) and new in promoted:
                    # Sure of the new word, at little force.
                    found.append((float(steered[i, new]) - 0.1 * multiple, feature, strength, i))
    found.sort(reverse=True)
    best: tuple[float, Steering] | None = None
    for _, feature, strength, i in _varied(found)[:tries]:
        edit = {hook_point: steer(sae, {feature: strength}, mode="set")}
        prompt = list(prompts[i])
        before = generate(lm, prompt, max_tokens=max_tokens)
        after = generate(lm, prompt, max_tokens=max_tokens, edits=edit, positions=[-1])
        fluency = _fluency(lm, prompt, after)
        different = sum(a != b for a, b in zip(before.split(), after.split(), strict=False))
        score = fluency + 0.05 * different
        if best is None or score > best[0]:
            text = lm.decode([t for t in prompt if t not in lm.special_ids])
            best = score, Steering(feature, strength, text, before, after, fluency)
    return best[1] if best else None


def _varied(found: list[tuple[float, int, float, int]]) -> list[tuple[float, int, float, int]]:
    """The same, but the best of every feature before the second best of any."""
    seen: dict[int, int] = {}
    ranked = []
    for item in found:
        seen[item[1]] = seen.get(item[1], 0) + 1
        ranked.append((seen[item[1]], item))
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])]


def _next_tokens(lm: LanguageModel, tokens: mx.array, last: np.ndarray) -> np.ndarray:
    """Log-probabilities [b, vocab] of the token after the marked one of each row."""
    at = mx.array(last.argmax(axis=1))
    logits = lm(tokens)[mx.arange(len(last)), at]
    return np.array(nn.log_softmax(logits.astype(mx.float32), axis=-1))


def _fluency(lm: LanguageModel, prompt: list[int], continuation: str) -> float:
    new = lm.encode(continuation, bos=False)
    if len(new) < 2:
        return -np.inf
    losses = token_losses(lm, mx.array([prompt + new], mx.int32))[0]
    return -float(losses[len(prompt) :].mean())
