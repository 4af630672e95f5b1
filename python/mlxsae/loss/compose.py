"""A loss is a weighted sum of named terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from mlxsae.code import Code
from mlxsae.loss.reconstruction import UNIFORM, RowTerm
from mlxsae.sae import SAE

if TYPE_CHECKING:
    from mlxsae.loss.auxk import AuxK


class Forward(NamedTuple):
    """What one forward pass knows; every term is a function of it.

    ``x [n, d_in]``, target ``y [n, d_out]`` (``x`` itself for an SAE), the code, ``y_hat [n, d_out]``, and
    ``dead [d_sae]`` (bool): silent for long *before* this batch; None where nobody asked for it. ``pre_acts [n, d_sae]``
    where the rule made them.
    """

    sae: SAE
    x: mx.array
    y: mx.array
    code: Code
    y_hat: mx.array
    dead: mx.array | None = None
    pre_acts: mx.array | None = None

    def dense_pre_acts(self) -> mx.array:
        """``[n, d_sae]``: the rule's, or by a product of its own where the rule never held them."""
        return self.sae.pre_acts(self.x) if self.pre_acts is None else self.pre_acts


Term = Callable[[Forward], mx.array]


@dataclass(frozen=True)
class Loss:
    """``sum_t weight_t * term_t``, kept in three groups because the fused engine can do the first two.

    Parameters
    ----------
    reconstruction : ``{name: (weight, f(squared errors, y))}``, see :mod:`mlxsae.loss.reconstruction`.
    auxk : ``(weight, AuxK)`` or None.
    terms : ``{name: (weight, f(Forward))}``, anything else.
    """

    reconstruction: Mapping[str, tuple[float, RowTerm]]
    auxk: tuple[float, AuxK] | None = None
    terms: Mapping[str, tuple[float, Term]] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        """Whether the reconstruction terms weigh all tokens of a batch alike."""
        return all(any(term is known for known in UNIFORM) for _, term in self.reconstruction.values())

    def __call__(self, forward: Forward) -> tuple[mx.array, dict[str, mx.array]]:
        """Total (float32 scalar) and the unweighted value of each term. Without ``forward.dead`` AuxK is left
        out.
        """
        error = forward.y.astype(mx.float32) - forward.y_hat.astype(mx.float32)
        total, values = self.of_squares(mx.square(error).sum(axis=-1), forward.y)
        named: dict[str, tuple[float, Term]] = dict(self.terms)
        if self.auxk is not None and forward.dead is not None:
            named["auxk"] = self.auxk
        for name, (weight, term) in named.items():
            values[name] = term(forward)
            total = total + weight * values[name]
        return total, values

    def of_squares(self, s: mx.array, y: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The reconstruction terms alone, from squared errors ``s [n]`` and target ``y``."""
        y = y.astype(mx.float32)
        total, values = mx.array(0.0), {}
        for name, (weight, term) in self.reconstruction.items():
            values[name] = term(s, y)
            total = total + weight * values[name]
        return total, values
