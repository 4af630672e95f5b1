"""Terms that bring silent latents back, beside AuxK."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxsae.loss.compose import Forward, row_squares
from mlxsae.loss.reconstruction import nonzero, sum_about_mean
from mlxsae.sae import TopK


@dataclass(frozen=True)
class PreActs:
    r""":math:`\mathrm{mean}_n \sum_{j\ dead} \mathrm{relu}(\theta_j - z_j) |W^{dec}_j|` (Anthropic, January 2025; over
    dead latents only, as SAELens does): pulls pre-activations of dead latents towards their threshold, 0 where the rule
    has none. ``every`` takes all latents, as the original. Customary weight: 3e-6.
    """

    every: bool = False

    def __call__(self, forward: Forward) -> mx.array:
        which = mx.array(True) if self.every else forward.dead
        if which is None:
            return mx.array(0.0)
        threshold = forward.sae.rule.thresholds()
        threshold = forward.sae.rule.get("threshold", mx.array(0.0)) if threshold is None else threshold
        threshold = threshold / nonzero(forward.sae.ranks(forward.sae.rule))
        short = nn.relu(threshold - forward.dense_pre_acts()) * forward.sae.decoder_norms()
        return mx.where(which, short, 0).sum(axis=-1).mean()


@dataclass(frozen=True)
class GhostGradients:
    r"""Dead latents, through an exponential in place of their activation, explain the residual (Jermyn and Templeton 2024;
    SAELens 3):

    .. math:: g = e^{z_{dead}} W^{dec}_{dead}, \quad \hat g = g \; sg\Big(\frac{|r|}{2 |g| + 10^{-6}}\Big), \quad
              \ell = (\hat g - r)^2, \quad L = \mathrm{mean}\Big(\ell \; sg\Big(\frac{m}{\ell + 10^{-6}}\Big)\Big)

    with the residual :math:`r = sg(y - \hat y)` and its squares m, element by element: the term is as large as the main
    loss (mean over elements) and its gradient small. Rows of a token are scaled by norms of the row. 0 with no dead latent.
    A constant factor on g cancels, so each token's largest exponent is taken out before it overflows.
    """

    def __call__(self, forward: Forward) -> mx.array:
        if forward.dead is None:
            return mx.array(0.0)
        if not forward.sae.products(forward.x):
            raise ValueError(
                f"[GhostGradients] the SAE must have one decoder but is a {type(forward.sae).__name__}."
            )
        residual = mx.stop_gradient(forward.y - forward.y_hat)
        squares = mx.square(residual)
        exponents = mx.where(forward.dead, forward.dense_pre_acts(), 0)
        over = mx.stop_gradient(mx.maximum(exponents.max(axis=-1, keepdims=True), 0))
        ghosts = mx.where(forward.dead, mx.exp(exponents - over), 0)
        out = ghosts @ forward.sae.decoder.weight
        norm = mx.linalg.norm(residual, axis=-1, keepdims=True)
        # No norm of zero: it has no derivative, and even a constant factor would let its NaN through.
        size = mx.stop_gradient(mx.linalg.norm(out, axis=-1, keepdims=True))
        out = out * mx.stop_gradient(norm / (1e-6 * mx.exp(-over) + 2 * size + 1e-30))
        each = mx.square(out - residual)
        each = each * mx.stop_gradient(squares / (each + 1e-6))
        return mx.where(forward.dead.any(), each.mean(), 0)


@dataclass(frozen=True)
class MultiTopK:
    r"""FVU of a reconstruction with ``factor`` times as many latents (Gao et al. 2024, section 4.3; sparsify): latents that
    just miss the selection learn too, and the SAE keeps working at other k. They are ranked as the SAE ranks its own.
    Customary weight: 1/8. For rules with a ``k``.
    """

    factor: int = 4

    def __post_init__(self) -> None:
        if self.factor != int(self.factor) or self.factor < 1:
            raise ValueError(f"[MultiTopK] factor must be a positive whole number but got {self.factor}.")

    def __call__(self, forward: Forward) -> mx.array:
        sae = forward.sae
        k = getattr(sae.rule, "k", None) if forward.k is None else forward.k
        if k is None:
            raise ValueError(f"[MultiTopK] the rule must have a k but is {type(sae.rule).__name__}.")
        if not sae.one_product:
            raise ValueError(f"[MultiTopK] the SAE must have one encoder but is a {type(sae).__name__}.")
        code = sae.learn(forward.x, {}, rule=TopK(min(int(self.factor) * k, sae.d_sae))).code
        squares = row_squares(forward.y, sae.decode(code, forward.x))
        return squares.sum() / nonzero(sum_about_mean(forward.y))
