"""One table: where the sites of a block lie in each family of mlx-lm models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .hook_point import SITES, HookPoint


def _add(x: mx.array, y: mx.array) -> mx.array:
    return x + y


def _add_clipped(x: mx.array, y: mx.array) -> mx.array:
    """Gemma 3 keeps a float16 residual stream finite by clipping each sum."""
    if x.dtype != mx.float16:
        return x + y
    bound = mx.finfo(mx.float16).max
    return mx.clip(x.astype(mx.float32) + y.astype(mx.float32), -bound, bound).astype(mx.float16)


@dataclass(frozen=True)
class Family:
    """Names of a block's modules. A site whose module is None does not exist in the family.

    `attn_out` and `mlp_out` name the module whose *output* is added to the residual stream, which is a
    norm where the family normalises after the sublayer; `mlp` names the module whose *input* is `mlp_in`.
    `parallel(block)` tells whether attention and MLP both read `resid_pre`, so that no `resid_mid` exists.
    `add` is the family's residual addition.
    """

    attn_out: str | None = None
    mlp: str | None = None
    mlp_out: str | None = None
    parallel: Callable[[nn.Module], bool] = lambda block: False
    add: Callable[[mx.array, mx.array], mx.array] = _add


def _always(block: nn.Module) -> bool:
    return True


def _as_configured(block: nn.Module) -> bool:
    return bool(block.use_parallel_residual)


_PRE_NORM = Family("self_attn", "mlp", "mlp")
_POST_NORM = Family("post_attention_layernorm", "mlp", "post_feedforward_layernorm")
_PARALLEL = Family("self_attn", "mlp", "mlp", parallel=_always)
_GEMMA3 = Family("post_attention_layernorm", "mlp", "post_feedforward_layernorm", add=_add_clipped)

# Keyed by the module of mlx_lm.models that defines the model's class (a "mistral" config makes a llama).
# Every row is tested on a random model of its class: the residual sums must come out bit for bit.
FAMILIES: dict[str, Family] = {
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "exaone4": _POST_NORM,
    "gemma": _PRE_NORM,
    "gemma2": _POST_NORM,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "glm4": Family("post_self_attn_layernorm", "mlp", "post_mlp_layernorm"),
    "gpt2": Family("attn", "mlp", "mlp"),
    "gpt_neox": Family("attention", "mlp", "mlp", parallel=_as_configured),
    "gpt_oss": _PRE_NORM,
    "llama": _PRE_NORM,
    "mamba": Family(),
    "mamba2": Family(),
    "mixtral": Family("self_attn", "block_sparse_moe", "block_sparse_moe"),
    "nanochat": Family("attn", "mlp", "mlp"),
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmoe": _PRE_NORM,
    "phi": _PARALLEL,
    "phi3": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen2_moe": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "stablelm": Family("self_attn", "mlp", "mlp", parallel=_as_configured),
    "starcoder2": _PRE_NORM,
}

# A model that is not in the table still has blocks, and a block still has an input and an output.
RESIDUAL_ONLY = Family()


class Place(NamedTuple):
    """A hook point in a given model: `kind` ("before", "after", "mid") of one call of `module`."""

    module: nn.Module
    kind: str
    block: nn.Module


def family_name(model: nn.Module) -> str:
    """The table's key for `model`: the last part of the module that defines its class."""
    return type(model).__module__.rpartition(".")[2]


def family_of(model: nn.Module) -> Family:
    """The row of the table for `model`; residual streams only where the table has none."""
    if type(model).__module__.startswith("mlx_lm.models."):
        return FAMILIES.get(family_name(model), RESIDUAL_ONLY)
    return RESIDUAL_ONLY


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, in order."""
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(block, nn.Module) for block in blocks):
        raise ValueError(
            "[hooks] model must be an mlx-lm model with a list `.layers` of blocks "
            f"but got {type(model).__name__}."
        )
    return list(blocks)


def sites_of(model: nn.Module, layer: int = 0) -> tuple[str, ...]:
    """The sites that block `layer` of `model` has, in the order of computation."""
    family, block = family_of(model), blocks_of(model)[layer]

    def there(site: str) -> bool:
        match site:
            case "resid_pre" | "resid_post":
                return True
            case "resid_mid":
                return there("attn_out") and there("mlp_out") and not family.parallel(block)
            case "attn_out":
                return family.attn_out is not None and family.attn_out in block
            case "mlp_in":
                return family.mlp is not None and family.mlp in block
            case _:
                return family.mlp_out is not None and family.mlp_out in block

    return tuple(site for site in SITES if there(site))


def locate(model: nn.Module, hook_point: HookPoint) -> Place:
    """Where `hook_point` lies in `model`.

    Raises
    ------
    ValueError
        Layer out of range (says the range), or a site that the block does not have (lists those it has).
    """
    blocks = blocks_of(model)
    if hook_point.layer >= len(blocks):
        raise ValueError(
            f"[hooks] layer must be in [0, {len(blocks) - 1}] for this model but got {hook_point.layer}."
        )
    sites = sites_of(model, hook_point.layer)
    if hook_point.site not in sites:
        raise ValueError(
            f"[hooks] {family_name(model)} has no {hook_point.site} in block {hook_point.layer}; "
            f"it has {', '.join(sites)}."
        )
    family, block = family_of(model), blocks[hook_point.layer]
    match hook_point.site:
        case "resid_pre":
            return Place(block, "before", block)
        case "resid_post":
            return Place(block, "after", block)
        case "attn_out" | "resid_mid":
            kind = "after" if hook_point.site == "attn_out" else "mid"
            return Place(getattr(block, str(family.attn_out)), kind, block)
        case "mlp_in":
            return Place(getattr(block, str(family.mlp)), "before", block)
        case _:
            return Place(getattr(block, str(family.mlp_out)), "after", block)
