"""Terms that hold the number of firing latents down."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxsae.loss.compose import Forward, Term
from mlxsae.sae import JumpReLU
from mlxsae.sae.straight_through import step


def expected_l0(forward: Forward) -> mx.array:
    """L0 of each token ``[n]``, with the pseudo-derivative of a JumpReLU's threshold."""
    rule = forward.sae.rule
    if not isinstance(rule, JumpReLU):
        raise ValueError(
            f"[l0] the rule must have a learned threshold (JumpReLU) but is {type(rule).__name__}."
        )
    fires = step(
        forward.dense_pre_acts(), rule.threshold, bandwidth=rule.bandwidth, through_input=rule.through_input
    )
    return fires.sum(axis=-1)


@dataclass(frozen=True)
class L0Target:
    r""":math:`(\bar{L_0} / k - 1)^2` of the batch's mean L0: holds it at ``k`` (dictionary_learning's JumpReLU).

    ``k`` None takes the rule's.
    """

    k: float | None = None

    def __call__(self, forward: Forward) -> mx.array:
        k = self.k or getattr(forward.sae.rule, "k", None)
        if k is None:
            raise ValueError("[L0Target] k must be given by the term or the rule but is None.")
        return mx.square(expected_l0(forward).mean() / k - 1)


TERMS: dict[str, Term] = {"l0_target": L0Target()}
"""Terms by the names that configurations use, each with its usual numbers."""

DEFAULT_TERMS: dict[str, dict[str, float]] = {"jumprelu": {"l0_target": 1.0}}
"""By architecture, the weights of the terms that its rule cannot do without."""
