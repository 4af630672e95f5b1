"""A loss is a weighted sum of named terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from mlxsae.code import Code
from mlxsae.loss.matryoshka import Prefixes, bands
from mlxsae.loss.reconstruction import UNIFORM, RowTerm
from mlxsae.sae import SAE
from mlxsae.sae.model import layer_norm

if TYPE_CHECKING:
    from mlxsae.loss.auxk import AuxK


class Context(NamedTuple):
    """Where the rows of a batch stand in text: row ``i`` is the activation of ``tokens.reshape(-1)[places[i]]``."""

    tokens: mx.array
    """int ``[b, t]``"""
    places: mx.array
    """int32 ``[n]``, ascending."""
    scale: mx.array
    """With ``shift``: a run's target ``y`` (or reconstruction) is ``y * scale + shift`` before its normalisation."""
    shift: mx.array

    @staticmethod
    def of(scheduled: Mapping[str, mx.array]) -> Context | None:
        names = [f"context.{name}" for name in Context._fields]
        return Context(*(scheduled[name] for name in names)) if names[0] in scheduled else None

    def named(self) -> dict[str, mx.array]:
        """For :attr:`Forward.scheduled`."""
        return {f"context.{name}": a for name, a in self._asdict().items()}


class Forward(NamedTuple):
    """What one forward pass knows; every term is a function of it.

    ``x [n, d_in]``, target ``y [n, d_out]`` (``x`` itself for an SAE), the code, ``y_hat [n, d_out]``, and
    ``dead [d_sae]`` (bool): silent for long *before* this batch; None where nobody asked for it. ``pre_acts [n, d_sae]``
    where the rule made them. ``scheduled`` is :meth:`Loss.scheduled` of the step. ``k`` is the rule's of the step, where it
    is annealed.
    """

    sae: SAE
    x: mx.array
    y: mx.array
    code: Code
    y_hat: mx.array
    dead: mx.array | None = None
    pre_acts: mx.array | None = None
    scheduled: Mapping[str, mx.array] = {}
    k: int | None = None

    @property
    def context(self) -> Context | None:
        """Of batches of whole contexts (:class:`~mlxsae.data.ContextActivations`)."""
        return Context.of(self.scheduled)

    def dense_pre_acts(self) -> mx.array:
        """``[n, d_sae]``: the rule's, or by a product of its own where the rule never held them."""
        return self.sae.pre_acts(self.x) if self.pre_acts is None else self.pre_acts

    def as_target(self, decoded: mx.array, *, mean: bool = False) -> mx.array:
        """What decoder rows write, ``[n, d_out]``, in the measure of ``y``: an SAE that normalises each token multiplies it
        by the token's deviation, and adds the ``mean`` to all of them together.
        """
        if self.sae.normalize_activations != "layer_norm":
            return decoded
        _, centre, deviation = layer_norm(self.x)
        return decoded * deviation + centre if mean else decoded * deviation


Term = Callable[[Forward], mx.array]
Weight = float | Callable[[int], float]
"""A number, or a function of the training step, counted from 0."""


@dataclass(frozen=True)
class Loss:
    """``sum_t weight_t * term_t``, kept in groups because the fused engine can do all but the last.

    Parameters
    ----------
    reconstruction : ``{name: (weight, f(squared errors, y))}``, see :mod:`mlxsae.loss.reconstruction`.
    auxk : ``(weight, AuxK)`` or None.
    terms : ``{name: (weight, f(Forward))}``, anything else; a weight may be a function of the step.
    prefixes : makes any SAE a Matryoshka: the reconstruction terms are a weighted sum over prefixes of the latents, see
        :mod:`mlxsae.loss.matryoshka`.
    """

    reconstruction: Mapping[str, tuple[float, RowTerm]]
    auxk: tuple[float, AuxK] | None = None
    terms: Mapping[str, tuple[Weight, Term]] = field(default_factory=dict)
    prefixes: Prefixes | None = None

    @property
    def uniform(self) -> bool:
        """Whether the reconstruction terms weigh all tokens of a batch alike."""
        return all(any(term is known for known in UNIFORM) for _, term in self.reconstruction.values())

    def scheduled(self, step: int, d_sae: int, seed: int = 0) -> dict[str, mx.array]:
        """What of the loss depends on the step, for :attr:`Forward.scheduled`: weights, the widths of prefixes, and what
        a term says by a method ``scheduled(step)`` of its own. What a term says under a key that is taken stands under
        ``<name>.<key>``, and the term finds it under its key.
        """
        found: dict[str, mx.array] = {}
        for name, (weight, term) in self.terms.items():
            if callable(weight):
                found[f"weight.{name}"] = mx.array(weight(step), mx.float32)
            if hasattr(term, "scheduled"):
                said: Mapping[str, mx.array] = term.scheduled(step)  # type: ignore[attr-defined]
                found |= {f"{name}.{key}" if key in found else key: value for key, value in said.items()}
        if self.prefixes is not None:
            found["prefixes"] = mx.array(self.prefixes.at(step, d_sae, seed), mx.int32)
        return found

    def __call__(self, forward: Forward) -> tuple[mx.array, dict[str, mx.array]]:
        """Total (float32 scalar) and the unweighted value of each term. Without ``forward.dead`` AuxK is left
        out.
        """
        y = forward.y.astype(mx.float32)
        total, values = self.of_squares([row_squares(y, y_hat) for y_hat in self._nested(forward)], y)
        named: dict[str, tuple[Weight, Term]] = dict(self.terms)
        if self.auxk is not None and forward.dead is not None:
            named["auxk"] = self.auxk
        for name, (weight, term) in named.items():
            own = {
                key.removeprefix(f"{name}."): value
                for key, value in forward.scheduled.items()
                if key.startswith(f"{name}.")
            }
            values[name] = term(forward._replace(scheduled={**forward.scheduled, **own}))
            factor = forward.scheduled[f"weight.{name}"] if callable(weight) else weight
            total = total + factor * values[name]
        return total, values

    def _nested(self, forward: Forward) -> list[mx.array]:
        """The reconstruction of each prefix, the full one last."""
        if self.prefixes is None:
            return [forward.y_hat]
        found, sae = [forward.y_hat], forward.sae
        for band in bands(forward.code, forward.scheduled["prefixes"])[:0:-1]:
            found.append(found[-1] - forward.as_target(sae.written(band)))
        return found[::-1]

    def of_squares(self, squares: Sequence[mx.array], y: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        """The reconstruction terms alone, from the squared errors ``[n]`` of each prefix and target ``y``: their total,
        and their values at the full width.
        """
        y = y.astype(mx.float32)
        total, values = mx.array(0.0), {}
        shares = [1.0] if self.prefixes is None else self.prefixes.shares(len(squares))
        for share, s in zip(shares, squares, strict=True):
            for name, (weight, term) in self.reconstruction.items():
                values[name] = term(s, y)
                total = total + share * weight * values[name]
        return total, values if self.prefixes is None else values | {"prefixes": total}


def row_squares(y: mx.array, y_hat: mx.array) -> mx.array:
    """``|y - y_hat|^2`` of each row."""
    return mx.square(y - y_hat.astype(mx.float32)).sum(axis=-1)
