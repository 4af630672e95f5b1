"""One table: where the sites of a block lie in each family of mlx-lm models."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import pattern
from .hook_point import SITES, HookPoint, HookPointLike, ModulePoint, Point, listed


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
    """Paths of modules within a block, `a|b` where blocks differ and have one or the other. A site whose module is
    not there does not exist in the block.

    `attn` is the attention module, for `attn_pattern`. `attn_out` and `mlp_out` name the module whose *output*
    is added to the residual stream, which is a norm where the family normalises after the sublayer. `z`, `mlp`
    and `mlp_post` name the modules whose *input* is `z`, `mlp_in` and `mlp_post`. `parallel(block)` tells
    whether attention and MLP both read `resid_pre`, so that no `resid_mid` exists. `add` is the family's
    residual addition.
    """

    attn: str = ""
    z: str = ""
    attn_out: str = ""
    mlp: str = ""
    mlp_post: str = ""
    mlp_out: str = ""
    parallel: Callable[[nn.Module], bool] = lambda block: False
    add: Callable[[mx.array, mx.array], mx.array] = _add


def _always(block: nn.Module) -> bool:
    return True


def _as_configured(block: nn.Module) -> bool:
    return bool(block.use_parallel_residual)


def _llama_like(
    attn: str = "self_attn",
    o_proj: str = "o_proj",
    mlp: str = "mlp",
    down_proj: str = "down_proj",
    **changes: Any,
) -> Family:
    """Attention and MLP as in a llama, under these names."""
    row = Family(attn, f"{attn}.{o_proj}", attn, mlp, f"{mlp}.{down_proj}", mlp)
    return replace(row, **changes)


_PRE_NORM = _llama_like()
_POST_NORM = _llama_like(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
_PARALLEL = _llama_like(parallel=_always)
_GEMMA3 = replace(_POST_NORM, add=_add_clipped)
_HYBRID = _llama_like(attn_out="self_attn|linear_attn")  # linear attention has neither heads' z nor a pattern

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
    "gemma4": _POST_NORM,  # with per-layer inputs and a scale, resid_post is more than resid_mid + mlp_out
    "gemma4_text": _POST_NORM,
    "glm4": _llama_like(attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    "glm4_moe": _PRE_NORM,
    "gpt2": _llama_like("attn", "c_proj", "mlp", "c_proj"),
    "gpt_neox": _llama_like("attention", "dense", "mlp", "dense_4h_to_h", parallel=_as_configured),
    "gpt_oss": _PRE_NORM,
    "llama": _PRE_NORM,
    "mamba": Family(),
    "mamba2": Family(),
    "ministral3": _PRE_NORM,
    "mistral3": _PRE_NORM,
    "mixtral": _llama_like(mlp="block_sparse_moe"),
    "nanochat": _llama_like("attn", "c_proj", "mlp", "c_proj"),
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmoe": _PRE_NORM,
    "phi": _llama_like("self_attn", "dense", "mlp", "fc2", parallel=_always),
    "phi3": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen2_moe": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": _HYBRID,
    "qwen3_moe": _PRE_NORM,
    "qwen3_next": _HYBRID,
    "seed_oss": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "stablelm": _llama_like(parallel=_as_configured),
    "starcoder2": _llama_like(down_proj="c_proj"),
}

# A model that is not in the table still has blocks, and a block still has an input and an output.
RESIDUAL_ONLY = Family()


class Place(NamedTuple):
    """A point in a given model: the module that is hooked, and how: the kinds stand in `hooks.py`."""

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


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path inside `module`; None where there is none."""
    found: Any = module
    for part in path.split("."):
        if isinstance(found, (list, tuple)):
            found = found[int(part)] if part.isdecimal() and int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, nn.Module) else None


def _places(model: nn.Module, block: nn.Module) -> dict[str, Place]:
    """The sites that `block` has, in the order of computation, and where they lie."""
    family = family_of(model)

    def at(paths: str, kind: str) -> Place | None:
        for path in paths.split("|"):
            if path and (module := submodule(block, path)) is not None:
                return Place(module, kind, block)
        return None

    attn = at(family.attn, "pattern")
    found = {
        "resid_pre": Place(block, "before", block),
        "attn_pattern": attn if attn and pattern.is_open(type(attn.module)) else None,
        "z": at(family.z, "before"),
        "attn_out": at(family.attn_out, "after"),
        "resid_mid": None if family.parallel(block) else at(family.attn_out, "mid"),
        "mlp_in": at(family.mlp, "before"),
        "mlp_post": at(family.mlp_post, "before"),
        "mlp_out": at(family.mlp_out, "after"),
        "resid_post": Place(block, "after", block),
    }
    return {site: place for site in SITES if (place := found[site]) is not None}


def sites_of(model: nn.Module, layer: int = 0) -> tuple[str, ...]:
    """The sites that block `layer` of `model` has, in the order of computation."""
    return tuple(_places(model, blocks_of(model)[layer]))


def locate(model: nn.Module, point: Point) -> Place:
    """Where `point` lies in `model`.

    Raises
    ------
    ValueError
        Layer out of range (says the range), a site that the block does not have (lists those it has), a path
        without a module (lists the nearest).
    """
    if isinstance(point, ModulePoint):
        module = submodule(model, point.path)
        if module is None:
            raise ValueError(_no_module(model, point.path))
        return Place(module, point.end, module)
    blocks = blocks_of(model)
    if point.layer >= len(blocks):
        raise ValueError(
            f"[hooks] layer must be in [0, {len(blocks) - 1}] for this model but got {point.layer}."
        )
    places = _places(model, blocks[point.layer])
    if point.site not in places:
        raise ValueError(
            f"[hooks] {family_name(model)} has no {point.site} in block {point.layer}; it has {', '.join(places)}."
        )
    return places[point.site]


def resolve(model: nn.Module, spec: HookPointLike, *, layer: int | None = None) -> Point:
    """The point of `model` that `spec` names, checked to be there.

    A string is a hook point in any spelling (`HookPoint.parse`) or the path of a module, whole or the end of
    one, optionally followed by `.input` or `.output`. For mlx-lm's models the hook point comes first, so that
    `layers.3.mlp` is what is added to the residual stream; for others, of which only their modules are known,
    the module does.

    Raises
    ------
    ValueError
        As `locate`, or a spelling that means nothing here; lists what there is.
    """
    if not isinstance(spec, str):
        point = spec if isinstance(spec, ModulePoint) else HookPoint.parse(spec, layer=layer)
        locate(model, point)
        return point
    ours = type(model).__module__.startswith("mlx_lm.models.")
    if layer is None and not ours and (found := _module_point(model, spec)):
        return found
    try:
        point = HookPoint.parse(spec, layer=layer)
    except ValueError as error:
        if layer is None and ours and (found := _module_point(model, spec)):
            return found
        if ours or getattr(model, "layers", None):
            raise
        raise ValueError(_no_module(model, spec)) from error
    locate(model, point)
    return point


def resolve_all(model: nn.Module, specs: HookPointLike | Iterable[HookPointLike]) -> list[Point]:
    """The distinct points of one spelling or of several, in the order given."""
    return list(dict.fromkeys(resolve(model, spec) for spec in listed(specs)))


def _module_point(model: nn.Module, spec: str) -> ModulePoint | None:
    """The module that `spec` names by its path or the end of it; None where none or several do."""
    front, _, last = spec.rpartition(".")
    for path, end in ((spec, "output"), (front, last)):
        if path and end in ("input", "output"):
            if submodule(model, path) is not None:
                return ModulePoint(path, end)
            ending = [name for name, _ in model.named_modules() if name.endswith("." + path)]
            if len(ending) == 1:
                return ModulePoint(ending[0], end)
    return None


def _no_module(model: nn.Module, path: str) -> str:
    names = sorted(name for name, _ in model.named_modules() if name)
    near = difflib.get_close_matches(path, names, n=5, cutoff=0.3) or names[:8]
    more = f" and {len(names) - len(near)} others" if len(names) > len(near) else ""
    return f"[hooks] {type(model).__name__} has no module {path!r}; it has {', '.join(near) or 'none'}{more}."
