"""What files hold of a rule: the function from pre-activations to latents that it is in use, in SAELens' words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxsae.sae import (
    RULES,
    BatchTopK,
    Gated,
    GroupMax,
    Hierarchical,
    JumpReLU,
    ReLU,
    Rule,
    SigmoidGated,
    TopK,
    TopKJumpReLU,
)


@dataclass(frozen=True)
class Function:
    """``arguments``: its keys in ``cfg.json``. ``arrays``: its arrays, by the shape that they have with ``f`` latents of
    ``d`` inputs. ``bias``: what files call the encoder's bias.
    """

    rule: type[Rule]
    arguments: tuple[str, ...] = ()
    arrays: dict[str, str] = field(default_factory=dict)
    bias: str = "b_enc"

    def shapes(self, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        sizes = {"f": d_sae, "d": d_in}
        return {name: tuple(sizes[letter] for letter in shape) for name, shape in self.arrays.items()}


# SAELens knows topk, jumprelu, standard and gated; of the others it refuses the name.
FUNCTIONS: dict[str, Function] = {
    "topk": Function(TopK, ("k",)),
    "jumprelu": Function(JumpReLU, (), {"threshold": "f"}),
    "standard": Function(ReLU),
    "gated": Function(Gated, (), {"r_mag": "f", "b_mag": "f"}, bias="b_gate"),
    "sigmoid_gated": Function(SigmoidGated, (), {"gate_weight": "fd", "gate_bias": "f"}),
    "topk_jumprelu": Function(TopKJumpReLU, ("k",), {"threshold": "f"}),
    "groupmax": Function(GroupMax, ("k",)),
    "hierarchical": Function(Hierarchical, ("k", "k_coarse", "d_coarse")),
}


def files_know(rule: Rule) -> bool:
    if isinstance(rule, Hierarchical):
        return type(rule.coarse) is TopK and type(rule.fine) is TopK
    return isinstance(rule, (BatchTopK, *(function.rule for function in FUNCTIONS.values())))


def function_of(rule: Rule, d_sae: int) -> tuple[str, dict[str, Any], dict[str, mx.array]]:
    """What the rule is in use: the function's name, its keys in ``cfg.json``, its arrays."""
    if isinstance(rule, BatchTopK):
        if rule.threshold is None:
            raise ValueError(
                "[save] a BatchTopK rule must have a threshold but has none: train the SAE, or mlxsae.sae.calibrate it."
            )
        return "jumprelu", {}, {"threshold": mx.full(d_sae, rule.threshold, mx.float32)}
    for name, function in FUNCTIONS.items() if files_know(rule) else ():
        if isinstance(rule, function.rule):
            arguments = {argument: getattr(rule, argument) for argument in function.arguments}
            return name, arguments, {array: rule[array] for array in function.arrays}
    raise ValueError(
        f"[save] rule must be one of {sorted(RULES)}, a hierarchical one of two TopK, but got {rule}; "
        "save its parameters with sae.save_weights."
    )


def rule_of(name: str, config: dict[str, Any], arrays: Mapping[str, mx.array], ours: dict[str, Any]) -> Rule:
    """The rule of a function; the one that it was trained by where our own metadata, ``ours``, remember that."""
    function = FUNCTIONS[name]
    options = {key: value for key, value in ours.items() if key != "architecture"}
    made = RULES.get(str(ours.get("architecture")), function.rule)
    if made is not function.rule and (name, made) != ("jumprelu", BatchTopK):
        raise ValueError(
            f"[load] the rule in metadata.json must be one of {name} but is {made.architecture}."
        )
    if unknown := sorted(options.keys() - set(made.PARAMETERS)):
        raise ValueError(f"[load] the rule in metadata.json must have only known keys but has {unknown}.")
    try:
        rule = made(**options | {argument: config[argument] for argument in function.arguments})
    except TypeError as error:
        raise ValueError(f"[load] cfg.json and metadata.json must fit the rule {name} but {error}") from error
    if isinstance(rule, BatchTopK):
        known, found = options.get("threshold"), arrays["threshold"].astype(mx.float32)
        if not isinstance(known, int | float) or not bool((found == known).all()):
            raise ValueError(
                f"[load] the threshold in metadata.json must be that of the weights but is {known!r}; without metadata.json "
                "the SAE is a JumpReLU."
            )
    if made is function.rule:
        for array in function.arrays:
            value = arrays[array]
            rule[array] = value.astype(mx.float32) if array == "threshold" else value
    return rule
