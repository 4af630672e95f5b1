r"""Matryoshka: the first latents must reconstruct by themselves (Bussmann et al. 2025, arXiv 2503.17547).

For prefixes of the latents of widths :math:`w_1 < \dots < w_G = d_{sae}` the reconstruction terms :math:`R` become

.. math:: \sum_g s_g \, R(y, \; b_{dec} + \textstyle\sum_{j < w_g} f_j W^{dec}_j)

over one code, made by any rule; shares :math:`s_g` sum to 1. (SAELens adds the terms up, which is G times as much;
dictionary_learning divides by G once for its default group weights and once for their mean, which is a G-th.) The
auxiliary losses see the residual of the full width.

The prefixes cut the latents into bands. A latent's gradient comes from every prefix that holds it, so each band is one
term of the one-pass update, whose residual is the sum over its own and all wider prefixes: no more gathers than without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlxsae.code import AnyCode, between


class Prefixes(Protocol):
    def at(self, step: int, d_sae: int, seed: int) -> list[int]:
        """Widths of training step ``step``, ascending, the last one ``d_sae``; always the same number of them."""
        ...

    def shares(self, n: int) -> Sequence[float]:
        """Weight of each of the ``n`` prefixes."""
        ...


@dataclass(frozen=True)
class FixedPrefixes:
    """Prefixes of given widths: shares of ``d_sae`` up to 1, numbers of latents over 1. The full width is added where it
    is not among them. ``weights`` (one for each, the full one included) are scaled to sum 1; None: all alike.
    """

    widths: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.widths or not all(0 < w < math.inf and (w <= 1 or w == int(w)) for w in self.widths):
            raise ValueError(
                f"[Prefixes] widths must be positive, and whole numbers where over 1, but got {self.widths}."
            )
        if self.weights is not None and not (min(self.weights) >= 0 and sum(self.weights) > 0):
            raise ValueError(
                f"[Prefixes] weights must be at least 0, not all of them, but got {self.weights}."
            )

    def at(self, step: int, d_sae: int, seed: int) -> list[int]:
        widths = [max(1, round(w * d_sae)) if w <= 1 else int(w) for w in self.widths]
        if widths[-1] < d_sae:
            widths.append(d_sae)
        if widths != sorted(set(widths)) or widths[-1] != d_sae:
            raise ValueError(f"[Prefixes] widths must ascend to at most d_sae={d_sae} but are {widths}.")
        return widths

    def shares(self, n: int) -> Sequence[float]:
        weights = self.weights or (1.0,) * n
        if len(weights) != n:
            raise ValueError(f"[Prefixes] there must be {n} weights but got {len(weights)}.")
        return [w / sum(weights) for w in weights]


@dataclass(frozen=True)
class RandomPrefixes:
    r""":math:`n - 1` widths drawn anew at each step, and the full one, all alike: no width is special.

    Widths follow a Pareto law cut off at ``d_sae``, :math:`p(w) \propto w^{-1-\alpha}`. They depend on the seed and the
    number of the step alone, so a resumed run draws what the uninterrupted one does.
    """

    n: int = 5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.n < 1 or self.n != int(self.n) or not self.alpha > 0:
            raise ValueError(
                "[Prefixes] n must be a positive whole number and alpha positive but got "
                f"n={self.n}, alpha={self.alpha}."
            )

    def at(self, step: int, d_sae: int, seed: int) -> list[int]:
        u = np.random.default_rng((seed, step)).random(self.n - 1)
        drawn = (1 - u * (1 - d_sae**-self.alpha)) ** (-1 / self.alpha)
        return [*sorted(int(w) for w in np.clip(drawn, 1, d_sae)), d_sae]

    def shares(self, n: int) -> Sequence[float]:
        return [1 / n] * n


def bands(code: AnyCode, widths: mx.array) -> list[AnyCode]:
    """The code cut into the latents of ``[0, w_1), [w_1, w_2), ...``."""
    lows = [mx.array(0, mx.int32), *widths[:-1]]
    return [between(code, low, high) for low, high in zip(lows, widths, strict=True)]
