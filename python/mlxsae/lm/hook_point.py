"""Names of the places where activations are read and edited: sites of a transformer block, and any module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

# site -> suffix of its TransformerLens name, in the order in which a block computes them.
SITES: dict[str, str] = {
    "resid_pre": "hook_resid_pre",
    "attn_pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}

# Other spellings of a site: short names, module names of mlx-lm blocks; "" where a path ends at the block.
_ALIASES: dict[str, str] = {
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attn": "attn_out",
    "pattern": "attn_pattern",
    "attn.pattern": "attn_pattern",
    "attn.z": "z",
    "heads": "z",
    "mlp": "mlp_out",
    "feed_forward": "mlp_out",
    "block_sparse_moe": "mlp_out",
    "": "resid_post",
    "resid": "resid_post",
    "residual": "resid_post",
    "output": "resid_post",
    "input": "resid_pre",
}
_ALIASES |= {site: site for site in SITES} | {suffix: site for site, suffix in SITES.items()}

_PATH = re.compile(r"(?:[A-Za-z_]\w*\.)*(?:blocks|layers|h)\.(\d+)(?:\.(.+))?")


def _site(component: str, spec: object) -> str:
    """The site that a component's name means."""
    if component in _ALIASES:
        return _ALIASES[component]
    known = ", ".join(SITES)
    if component == "hook_mlp_in":  # in TransformerLens this is not what the MLP gets
        raise ValueError(
            f"[HookPoint.parse] component must say what is meant but got {spec!r}: TransformerLens' "
            "hook_mlp_in is the residual before the norm. Say resid_mid for that, mlp_in for the MLP's input."
        )
    raise ValueError(
        f"[HookPoint.parse] component must be one of {known} (or mlp, attn, resid, residual, output) "
        f"but got {component!r} in {spec!r}."
    )


@dataclass(frozen=True, order=True)
class HookPoint:
    """One place in one block of a language model.

    =============  ==========================================================================
    site           the activation there, [b, t, d_model] where no shape is named
    =============  ==========================================================================
    `resid_pre`    residual stream entering block `layer`
    `attn_pattern` attention weights, after mask and softmax, [b, n_heads, t, keys]; float of the
                   model's dtype. Computed beside the fused kernel, and only where it is asked for;
                   under a KV cache keys are those that it holds, the oldest first
    `z`            outputs of the heads, side by side, as the output projection gets them
                   [b, t, n_heads * d_head]; `z.reshape(b, t, n_heads, d_head)` tells them apart
    `attn_out`     attention's contribution, exactly as it is added to the residual stream
                   (after the post-norm in families that have one: gemma2, gemma3, olmo2)
    `resid_mid`    `resid_pre + attn_out`; parallel blocks (phi, gpt_neox, cohere) have none
    `mlp_in`       what the MLP module gets, after the norm
    `mlp_post`     hidden units of the MLP, after the nonlinearity and the gate [b, t, d_mlp];
                   a mixture of experts has none
    `mlp_out`      the MLP's contribution, exactly as it is added to the residual stream
    `resid_post`   residual stream leaving block `layer`, the `resid_pre` of `layer + 1`
    =============  ==========================================================================

    Parameters
    ----------
    layer : int
        Number of the block, counted from 0.
    site : str
        One of the names above. `HookPoint.parse` takes every other spelling.

    `str(hook_point)` is TransformerLens' spelling, `blocks.3.hook_resid_post`.
    """

    layer: int
    site: str

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"[HookPoint] layer must be an int >= 0 but got {self.layer!r}.")
        if self.site not in SITES:
            raise ValueError(f"[HookPoint] site must be one of {', '.join(SITES)} but got {self.site!r}.")

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{SITES[self.site]}"

    @classmethod
    def parse(
        cls, spec: HookPoint | str | tuple[str, int] | tuple[int, str], *, layer: int | None = None
    ) -> HookPoint:
        """The hook point that `spec` names.

        Parameters
        ----------
        spec : HookPoint, (site, layer) or (layer, site), or str
            A component (`mlp`, `attn`, `resid`, `residual`, `output`, or a site) together with `layer`;
            a module path (`layers.10.mlp`, `model.model.layers.10.self_attn`, `transformer.h.2`); or
            TransformerLens' name (`blocks.10.hook_resid_post`). A path that ends at the block is its output.
            `mlp` and `attn` are `mlp_out` and `attn_out`; `resid`, `residual`, `output` are `resid_post`.
        layer : int, optional
            Needed where `spec` does not name a layer, and must agree where it does.

        Raises
        ------
        ValueError
            An unknown component (lists what there is), a missing or contradictory layer.
        """
        if isinstance(spec, cls):
            found = spec
        elif isinstance(spec, tuple) and len(spec) == 2:
            number, component = spec if isinstance(spec[0], int) else (spec[1], spec[0])
            if not isinstance(component, str) or not isinstance(number, int):
                raise ValueError(f"[HookPoint.parse] a pair must be (site, layer) but got {spec!r}.")
            found = cls(number, _site(component, spec))
        elif isinstance(spec, str):
            path = _PATH.fullmatch(spec)
            if path:
                found = cls(int(path[1]), _site(path[2] or "", spec))
            else:
                site = _site(spec or "nothing", spec)
                if layer is None:
                    raise ValueError(
                        f"[HookPoint.parse] layer must be given for {spec!r}, "
                        f"as layer=N or as in 'blocks.N.{SITES[site]}'."
                    )
                found = cls(layer, site)
        else:
            raise ValueError(
                f"[HookPoint.parse] spec must be a HookPoint, a str or a pair but got {type(spec).__name__}."
            )
        if layer is not None and layer != found.layer:
            raise ValueError(
                f"[HookPoint.parse] {spec!r} names layer {found.layer} but layer={layer} was given."
            )
        return found


@dataclass(frozen=True, order=True)
class ModulePoint:
    """Input or output of one module of any `mlx.nn` model, mlx-lm's or not.

    Parameters
    ----------
    path : str
        As `model.named_modules()` spells it, such as `encoder.layers.3.fc1`.
    end : str
        `output` or `input`: what the module returns (the first of it where that is a tuple), or its first
        argument. An array of any shape.

    `str(point)` is `path.end`.
    """

    path: str
    end: str = "output"

    def __post_init__(self) -> None:
        if self.end not in ("output", "input"):
            raise ValueError(f"[ModulePoint] end must be 'output' or 'input' but got {self.end!r}.")

    def __str__(self) -> str:
        return f"{self.path}.{self.end}"


Point = HookPoint | ModulePoint
HookPointLike = HookPoint | ModulePoint | str | tuple[str, int] | tuple[int, str]


def listed(specs: HookPointLike | Iterable[HookPointLike]) -> list[HookPointLike]:
    """One spelling or several, as a list."""
    one = isinstance(specs, (str, HookPoint, ModulePoint)) or (
        isinstance(specs, tuple) and len(specs) == 2 and any(isinstance(part, int) for part in specs)
    )
    return [specs] if one else list(specs)  # type: ignore[list-item, arg-type]


T = TypeVar("T")


class ByPoint(dict[Point, T]):
    """A dict keyed by points whose `[...]`, `get` and `in` take every spelling of them.

    A spelling without a layer (`mlp`) works where only one of the points has that site.
    """

    def __missing__(self, key: Any) -> T:
        if (point := self._find(key)) is None:
            there = ", ".join(map(str, self)) or "nothing"
            raise KeyError(f"[hooks] there must be an activation at {key!s} but there is {there}.")
        return self[point]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._find(key) is not None

    def get(self, key: Any, default: Any = None) -> Any:
        found = key if super().__contains__(key) else self._find(key)
        return default if found is None else self[found]

    def _find(self, key: Any) -> Point | None:
        if isinstance(key, str):
            names = {
                name: point
                for point in self
                if isinstance(point, ModulePoint)
                for name in ((str(point), point.path) if point.end == "output" else (str(point),))
            }
            if key in names:
                return names[key]
            ending = [point for name, point in names.items() if name.endswith("." + key)]
            if ending:
                return ending[0] if len(ending) == 1 else None
            if key in _ALIASES:
                alone = [
                    point for point in self if isinstance(point, HookPoint) and point.site == _ALIASES[key]
                ]
                return alone[0] if len(alone) == 1 else None
        if isinstance(key, (str, tuple)):
            try:
                point = HookPoint.parse(key)  # type: ignore[arg-type]
            except ValueError:
                return None
            return point if super().__contains__(point) else None
        return None
