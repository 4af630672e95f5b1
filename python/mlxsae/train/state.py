"""All that a run carries from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxsae.ops import Shadow
from mlxsae.sae import SAE, Rule
from mlxsae.train.config import TrainConfig

ACTIVATIONS, LOSS, GRADIENT = 1, 2, 3
"""What ``failed[1]`` says was not finite."""


@dataclass
class Lazy:
    """Of a decoder some of whose rows have missed steps that they will make (:func:`mlxsae.ops.adam_catch_up`).

    Where rows catch up, decoder, moments and ``last_step`` change together, in place, so that whoever holds the state holds
    the same state as before.
    """

    last_step: mx.array  # int32 [d_sae]: the last step that each row has made
    step: int  # the last step of the others
    rates: tuple[float, ...]  # learning rates up to that of `step`
    config: TrainConfig  # that of the engine


@dataclass(frozen=True)
class TrainState:
    """State in, state out: a step makes a new one and never changes what the old one says (:class:`Lazy`).

    Attributes
    ----------
    params : trainable parameters in float32, a tree as ``SAE.trainable_parameters`` gives it, in *scaled*
        space: the activations they see are ``scale[0] * x`` and ``scale[1] * y``.
    optimizer : the optimiser's state tree (Adam: ``m`` and ``v`` of each parameter, ``step``,
        ``learning_rate``). tokens_since_fired : int32 ``[d_sae]``. failed : int32 ``[2]``, the first step
        whose loss was not finite and what was not (see ``ACTIVATIONS``); (-1, 0) while all is well.
        From that step on nothing is updated.
    rule : what the rule carries (``Rule.initial_state``), such as BatchTopK's running threshold.
    step, tokens : steps done, tokens seen.
    auxk_active : whether the step computes AuxK. Read from the device every few steps, a part of the state so
        that a resumed run decides as the uninterrupted one.
    norm : ``mean_in``, ``std_in`` and for a target of its own ``mean_out``, ``std_out`` of a run with
        ``normalize="mean_std"``; ``whiten_*`` and its inverse ``unwhiten_*`` for ``std_*`` with ``"whiten"``; otherwise empty.
    shadow : the encoder's, in a certified or bfloat16 run, once a step has made it. It follows from the parameters, so no
        file holds it.
    lazy : which steps decoder rows have made, in a run with lazy Adam, while some are behind (:meth:`Run.settle`).
    """

    params: dict[str, Any]
    optimizer: dict[str, Any]
    tokens_since_fired: mx.array
    failed: mx.array
    rule: dict[str, mx.array] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    auxk_active: bool = False
    norm: dict[str, mx.array] = field(default_factory=dict)
    shadow: Shadow | None = None
    lazy: Lazy | None = None

    @property
    def arrays(self) -> dict[str, Any]:
        """The part that lives on the device, as one tree."""
        found = {"shadow": self.shadow, "lazy": self.lazy}
        return self._trained | {name: held for name, held in found.items() if held is not None}

    @property
    def _trained(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "optimizer": self.optimizer,
            "tokens_since_fired": self.tokens_since_fired,
            "failed": self.failed,
            "rule": self.rule,
        }

    @property
    def _stored(self) -> dict[str, Any]:
        return self._trained | ({"norm": self.norm} if self.norm else {})

    def to_files(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """A JSON-able part and flat named arrays."""
        host = {
            "step": self.step,
            "tokens": self.tokens,
            "scale": list(self.scale),
            "auxk_active": self.auxk_active,
        }
        return host, flat(self._stored)

    def from_files(self, host: dict[str, Any], arrays: dict[str, mx.array]) -> TrainState:
        """The state that :meth:`to_files` gave, for the same SAE and optimiser as this state."""
        mine = flat(self._stored)
        for name in sorted(mine.keys() | arrays.keys()):
            a, b = mine.get(name), arrays.get(name)
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                shown = ["nothing" if s is None else f"{s.dtype} {s.shape}" for s in (a, b)]
                raise ValueError(
                    f"[resume] {name} must be {shown[0]} for this SAE but the checkpoint has {shown[1]}."
                )
        tree: Any = tree_unflatten(list(arrays.items()))
        return replace(
            self,
            **tree,
            shadow=None,
            lazy=None,
            step=host["step"],
            tokens=host["tokens"],
            scale=tuple(host["scale"]),
            auxk_active=host["auxk_active"],
        )


def flat(tree: Any) -> dict[str, mx.array]:
    """Leaves of a tree by their dotted names."""
    return dict(tree_flatten(tree))  # type: ignore[arg-type]


def scaled_params(sae: SAE, params: dict[str, Any], s_in: float, s_out: float) -> dict[str, Any]:
    """Parameters for activations ``s_in * x`` and targets ``s_out * y``, of the same function.

    Latents scale with the input: biases and thresholds take the scale, ``W_enc`` stays, and ``W_dec`` takes
    ``s_out / s_in``, 1 for an SAE, whose decoder rows so keep their norm (:meth:`SAE.units`). Inverse: the reciprocal
    scales.
    """
    if sae.apply_b_dec_to_input and s_in != s_out:
        raise ValueError(f"[fit] an SAE must have one scale but got {s_in} and {s_out}.")
    leaves = flat(params)
    for name, (of_input, of_target) in sae.units().items():
        factor = s_out**of_target * s_in**of_input if of_input >= 0 else s_out**of_target / s_in**-of_input
        if name in leaves and factor != 1.0:
            leaves[name] = leaves[name] * factor
    return tree_unflatten(list(leaves.items()))


def normalized(a: mx.array, norm: dict[str, mx.array], side: str) -> mx.array:
    """``(a - mean) / std`` or ``(a - mean) W`` of rows ``a [n, d]`` (or one row), by what ``norm`` holds for ``side``."""
    a = a - norm[f"mean_{side}"]
    return a @ norm[f"whiten_{side}"] if f"whiten_{side}" in norm else a / norm[f"std_{side}"]


def inverted(norm: dict[str, mx.array]) -> dict[str, mx.array]:
    """The normalisation that takes :func:`normalized` rows back to raw ones."""
    found: dict[str, mx.array] = {}
    for side in (name.removeprefix("mean_") for name in norm if name.startswith("mean_")):
        found[f"mean_{side}"] = normalized(mx.zeros_like(norm[f"mean_{side}"]), norm, side)
        if f"whiten_{side}" in norm:
            found |= {f"whiten_{side}": norm[f"unwhiten_{side}"], f"unwhiten_{side}": norm[f"whiten_{side}"]}
        else:
            found[f"std_{side}"] = 1 / norm[f"std_{side}"]
    return found


def unnormalized(sae: SAE, params: dict[str, Any], norm: dict[str, mx.array]) -> dict[str, Any]:
    """Parameters for raw activations, of the same function as ``params`` on :func:`normalized` input and target; latents
    stay what they are."""
    if not norm:
        return params
    params = tree_map(lambda p: p, params)
    out = "out" if "mean_out" in norm else "in"

    def read(rows: mx.array) -> mx.array:  # rows that read the input
        return rows @ norm["whiten_in"] if "whiten_in" in norm else rows / norm["std_in"]

    def written(rows: mx.array) -> mx.array:  # rows that are written to the output
        return rows @ norm[f"unwhiten_{out}"] if f"unwhiten_{out}" in norm else rows * norm[f"std_{out}"]

    encoder, decoder = params["encoder"], params["decoder"]
    encoder["weight"] = read(encoder["weight"])
    if not sae.apply_b_dec_to_input:
        encoder["bias"] = encoder["bias"] - encoder["weight"] @ norm["mean_in"]
    if "W_skip" in params:
        skip = read(params["W_skip"])
        decoder["bias"] = decoder["bias"] - skip @ norm["mean_in"]
        params["W_skip"] = written(skip.T).T
    decoder["weight"] = written(decoder["weight"])
    decoder["bias"] = written(decoder["bias"]) + norm[f"mean_{out}"]
    if "rule" in params:
        mean = None if sae.apply_b_dec_to_input else norm["mean_in"]
        params["rule"] = sae.rule.for_raw(params["rule"], encoder["weight"], read, mean)
    return params


def folded(sae: SAE) -> set[str]:
    """Names of the parameters that :func:`unnormalized` changes."""
    names = {"encoder.weight", "decoder.weight", "decoder.bias", "W_skip"}
    names |= set() if sae.apply_b_dec_to_input else {"encoder.bias"}
    if type(sae.rule).for_raw is not Rule.for_raw:
        names |= {f"rule.{name}" for name in flat(sae.rule.parameters())}
    return names
