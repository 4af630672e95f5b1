"""Terms that hold the number of firing latents, or their size, down.

Latents are weighed by the norm of their decoder row (for a crosscoder by the sum over sources), so shrinking a latent and
growing its row gains nothing; with rows of unit norm that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxsae.code import DenseCode, SparseCode, n_tokens
from mlxsae.loss.compose import Forward
from mlxsae.loss.reconstruction import fvu, nonzero
from mlxsae.sae.straight_through import step


def weighed(forward: Forward) -> mx.array:
    """``|f_j| |W_dec[j]|`` of every entry of the code, in the shape of its values; latents of an activation of one's own may
    be negative."""
    code, norms = forward.code, forward.sae.decoder_norms()
    # No abs: its derivative at 0 is 0, and a shut gate's latent is 0 with a derivative.
    sizes = mx.where(code.values < 0, -code.values, code.values)
    return sizes * (norms if isinstance(code, DenseCode) else norms[code.indices])


def _must_be_positive(who: str, name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"[{who}] {name} must be positive but got {value}.")


def row_sums(forward: Forward, entries: mx.array) -> mx.array:
    """Sums over the entries of each token, ``[n]``."""
    if isinstance(forward.code, DenseCode | SparseCode):
        return entries.sum(axis=-1)
    n = n_tokens(forward.code)
    return mx.zeros(n + 1, entries.dtype).at[forward.code.rows()].add(entries)[:n]


@dataclass(frozen=True)
class L1:
    r""":math:`\mathrm{mean}_n \sum_j |f_j| |W^{dec}_j|` (Anthropic's April 2024 update, SAELens' ``standard``)."""

    def __call__(self, forward: Forward) -> mx.array:
        return weighed(forward).sum() / n_tokens(forward.code)


@dataclass(frozen=True)
class Lp:
    r""":math:`\mathrm{mean}_n \sum_j (|f_j| |W^{dec}_j|)^p`, or with ``root`` the p-norm, its p-th root (SAELens).

    ``p`` may be a function of the step: p-annealing (Karvonen et al. 2024) goes from 1 down to 0.2, and then counts
    latents rather than their size. Only latents that fire have a gradient. The penalty's size changes with p; ``like=1``
    multiplies it, as a constant, to the size that the penalty of p = 1 has on the same batch, so one weight does for the
    whole run. (dictionary_learning multiplies its weight by the ratio of both at each change of p, which comes to that.)

    ``gate`` takes a gated SAE's gate, :math:`\mathrm{relu}(\pi_j)`, in place of its latents.
    """

    p: float | Callable[[int], float] = 1.0
    root: bool = False
    like: float | None = None
    gate: bool = False

    def __post_init__(self) -> None:
        for name, value in (("p", None if callable(self.p) else self.p), ("like", self.like)):
            _must_be_positive("Lp", name, value)

    def scheduled(self, step: int) -> dict[str, mx.array]:
        p = self.p(step) if callable(self.p) else self.p
        _must_be_positive("Lp", f"p of step {step}", p)
        return {"lp.p": mx.array(p, mx.float32)}

    def __call__(self, forward: Forward) -> mx.array:
        penalty = self._of(forward, forward.scheduled["lp.p"] if callable(self.p) else self.p)
        if self.like is None:
            return penalty
        return penalty * mx.stop_gradient(self._of(forward, self.like) / nonzero(penalty))

    def _of(self, forward: Forward, p: float | mx.array) -> mx.array:
        f = _weighed_gate(forward) if self.gate else weighed(forward)
        powers = mx.where(f > 0, mx.power(mx.where(f > 0, f, 1), p), 0)
        sums = powers.sum(axis=-1) if self.gate else row_sums(forward, powers)
        if self.root:
            sums = mx.where(sums > 0, mx.power(mx.where(sums > 0, sums, 1), 1 / p), 0)
        return sums.mean()


def anneal(start: float, end: float, begin: int, finish: int) -> Callable[[int], float]:
    """A function of the step: ``start`` until ``begin``, then linearly to ``end`` at ``finish``."""
    if not 0 <= begin < finish:
        raise ValueError(f"[anneal] begin must be in [0, finish) but got {begin} and {finish}.")
    return lambda step: start + (end - start) * min(1.0, max(0.0, (step - begin) / (finish - begin)))


@dataclass(frozen=True)
class Tanh:
    r""":math:`\mathrm{mean}_n \sum_j \tanh(c |f_j| |W^{dec}_j|)`: L1 for small latents, L0 for large ones (Anthropic,
    January 2025).
    """

    c: float = 4.0

    def __post_init__(self) -> None:
        _must_be_positive("Tanh", "c", self.c)

    def __call__(self, forward: Forward) -> mx.array:
        return mx.tanh(self.c * weighed(forward)).sum() / n_tokens(forward.code)


def expected_l0(forward: Forward) -> mx.array:
    """L0 of each token ``[n]``, with the pseudo-derivative of a JumpReLU's threshold."""
    rule: Any = forward.sae.rule
    threshold = rule.thresholds()
    if threshold is None:
        raise ValueError(
            f"[l0] the rule must have a learned threshold (JumpReLU) but is {type(rule).__name__}."
        )
    compared = forward.dense_pre_acts()
    if forward.sae.rank_by_decoder_norm:
        compared = compared * forward.sae.ranks(rule)
    fires = step(compared, threshold, bandwidth=rule.bandwidth, through_input=rule.through_input)
    return fires.sum(axis=-1)


@dataclass(frozen=True)
class L0:
    """Mean L0 of the batch, as a JumpReLU's thresholds feel it (Rajamanoharan et al. 2024; SAELens' ``step``)."""

    def __call__(self, forward: Forward) -> mx.array:
        return expected_l0(forward).mean()


def _k(forward: Forward, k: float | None) -> float:
    if k is not None:
        return k
    k = getattr(forward.sae.rule, "k", None)
    if k is None:
        raise ValueError("[l0] k must be given by the term or the rule but is None.")
    return k * getattr(forward.sae, "n_layers", 1)  # a rule's is that of a layer


@dataclass(frozen=True)
class L0Target:
    r""":math:`(\overline{L_0} / k - 1)^2` of the batch's mean L0: holds it at ``k`` (dictionary_learning's JumpReLU).

    ``k`` None takes the rule's.
    """

    k: float | None = None

    def __post_init__(self) -> None:
        _must_be_positive("L0Target", "k", self.k)

    def __call__(self, forward: Forward) -> mx.array:
        return mx.square(expected_l0(forward).mean() / _k(forward, self.k) - 1)


@dataclass(frozen=True)
class L0Quadratic:
    r""":math:`\mathrm{mean}_n \frac{2}{k} (L_0 - k)^2` of each token's L0 (Gemma Scope 2). ``k`` None takes the rule's."""

    k: float | None = None

    def __post_init__(self) -> None:
        _must_be_positive("L0Quadratic", "k", self.k)

    def __call__(self, forward: Forward) -> mx.array:
        k = _k(forward, self.k)
        return (2 / k * mx.square(expected_l0(forward) - k)).mean()


def _gate(forward: Forward) -> mx.array:
    if forward.pre_acts is None:
        raise ValueError("[gate] the rule must be gated, but its forward pass has no pre-activations.")
    return forward.pre_acts


def _weighed_gate(forward: Forward) -> mx.array:
    """``relu(pi_j) |W_dec[j]|``, ``[n, d_sae]``."""
    return nn.relu(_gate(forward)) * forward.sae.decoder_norms()


@dataclass(frozen=True)
class GateL1:
    r""":math:`\mathrm{mean}_n \sum_j \mathrm{relu}(\pi_j) |W^{dec}_j|` of a gated SAE's gate (the paper's has decoder rows
    of norm 1)."""

    def __call__(self, forward: Forward) -> mx.array:
        return _weighed_gate(forward).sum(axis=-1).mean()


@dataclass(frozen=True)
class GateReconstruction:
    r""":math:`\mathrm{mean}_n |y - \mathrm{relu}(\pi) W_{dec} - b_{dec}|^2` with the decoder as a constant: what teaches a
    gated SAE's gate (Rajamanoharan et al. 2024). ``detach=False`` also moves the decoder (SAELens). ``relative`` divides
    by the variance, as FVU does.
    """

    detach: bool = True
    relative: bool = False

    def __call__(self, forward: Forward) -> mx.array:
        if not forward.sae.products(forward.x):
            raise ValueError(
                f"[gate_reconstruction] the SAE must have one decoder but is a {type(forward.sae).__name__}."
            )
        weight, bias = forward.sae.decoder.weight, forward.sae.decoder.bias
        if self.detach:
            weight, bias = mx.stop_gradient(weight), mx.stop_gradient(bias)
        y_hat = forward.as_target(mx.addmm(bias, nn.relu(_gate(forward)), weight), mean=True)
        error = y_hat - forward.y
        squares = mx.square(error).sum(axis=-1)
        return fvu(squares, forward.y) if self.relative else squares.mean()


@dataclass(frozen=True)
class GateMean:
    """Mean openness of a :class:`~mlxsae.sae.SigmoidGated`'s gates, between 0 and 1."""

    def __call__(self, forward: Forward) -> mx.array:
        return mx.sigmoid(_gate(forward)).mean()
