"""What features cause: the change in the model's next-token prediction when one is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae.analysis.examples import Example
from mlxsae.analysis.steering import steer
from mlxsae.lm import HookPoint, LanguageModel, only_at, splice
from mlxsae.sae import SAE


class Effect(NamedTuple):
    """A token, and by how many nats its log-probability falls when the feature is ablated (negative: rises)."""

    token: int
    change: float


def direct_effects(
    lm: LanguageModel,
    sae: SAE,
    hook_point: HookPoint,
    feature: int,
    examples: Sequence[Example],
    *,
    n: int = 5,
    min_probability: float = 0.01,
) -> list[Effect]:
    """The tokens that ``feature`` makes likelier, strongest first: at most ``n``.

    The model reads each example up to its peak, once as it is and once with the feature ablated there (as a delta, see
    :func:`~mlxsae.analysis.steer`); the log-probabilities of the next token are compared and averaged over the examples.
    Tokens whose mean probability with the feature is below ``min_probability`` are left out: what nobody would say is
    no effect.
    """
    if not examples:
        return []
    hook_point = lm.hook_point(hook_point)
    start = [] if lm.bos_id is None else [lm.bos_id]
    ablate = steer(sae, {feature: 0.0})
    changes, likely = [], []
    for example in examples:
        tokens = mx.array([start + example.tokens[: example.peak + 1].tolist()], mx.int32)
        with_feature = _next_token(lm, tokens)
        there = mx.arange(tokens.shape[1])[None] == tokens.shape[1] - 1
        with splice(lm, {hook_point: only_at(ablate, there)}):
            without = _next_token(lm, tokens)
        changes.append(with_feature - without)
        likely.append(mx.exp(with_feature))
    change, probability = (np.array(mx.stack(part).mean(axis=0)) for part in (changes, likely))
    order = np.argsort(-np.where(probability >= min_probability, change, -np.inf), kind="stable")
    return [
        Effect(int(t), float(change[t]))
        for t in order[:n]
        if probability[t] >= min_probability and change[t] > 0
    ]


def _next_token(lm: LanguageModel, tokens: mx.array) -> mx.array:
    """Log-probabilities [vocab] of the token after ``tokens [1, t]``."""
    return nn.log_softmax(lm(tokens)[0, -1].astype(mx.float32))
