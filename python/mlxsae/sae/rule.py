"""Rules: which latents of a token stay.

A new architecture is one class here. A rule with a fused op overrides :meth:`Rule.encode` and says
``fused = True``, and :meth:`Rule.encode_masked` if the op makes a second selection; any other gives
:meth:`Rule.select`, its definition on dense pre-activations.
A rule may own parameters (thresholds): it is a module.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxsae import ops
from mlxsae.code import SparseCode


class Rule(nn.Module):
    """What turns ``x @ W_enc + b_enc`` into a sparse code."""

    architecture: ClassVar[str] = ""
    """The name in ``cfg.json``; empty for rules that files do not know."""
    fused: ClassVar[bool] = False
    """True where :meth:`encode` never holds the pre-activations ``[n, d_sae]``."""

    PARAMETERS: ClassVar[tuple[str, ...]] = ()
    """The constructor's arguments, each also an attribute and a key of ``cfg.json``."""

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCode:
        """Code of ``x [n, d_in]`` under feature-major ``weight [d_sae, d_in]`` and ``bias [d_sae]``.

        ``shadow = ops.encoder_shadow(weight)`` lets a fused op screen in bfloat16; the code has the same bits.
        """
        return self.select(mx.addmm(bias, x, weight.T))

    def encode_masked(
        self,
        x: mx.array,
        weight: mx.array,
        bias: mx.array,
        mask: mx.array,
        k_aux: int,
        shadow: ops.Shadow | None = None,
    ) -> tuple[SparseCode, SparseCode]:
        """:meth:`encode`, and from the same product the ``k_aux`` largest among ``mask [d_sae]``, then relu."""
        raise NotImplementedError(f"[{type(self).__name__}] the rule has no op for a second selection.")

    def select(self, pre_acts: mx.array) -> SparseCode:
        """Code of dense ``pre_acts [n, d_sae]``."""
        raise NotImplementedError(f"[{type(self).__name__}] a rule must define select or encode.")

    def check(self, d_sae: int) -> None:
        """Raise ``ValueError`` where the rule does not fit ``d_sae`` latents."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as they stand in ``cfg.json``."""
        return {name: getattr(self, name) for name in self.PARAMETERS}


class TopK(Rule):
    """The ``k`` largest pre-activations of each token, then relu (Gao et al. 2024, arXiv 2406.04093).

    Selection is on float32 pre-activations, ties go to the lowest index; the slots of a token ascend
    by index. A token with fewer than ``k`` positive pre-activations has slots of value 0, which neither
    count as fired nor carry a gradient.
    """

    architecture = "topk"
    fused = True
    PARAMETERS = ("k",)

    def __init__(self, k: int):
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"[TopK] k must be an int but got {type(k).__name__}.")
        if k <= 0:
            raise ValueError(f"[TopK] k must be positive but got k={k}.")
        self.k = k

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCode:
        return ops.topk_encode(x, weight, bias, k=self.k, shadow=shadow)

    def encode_masked(
        self,
        x: mx.array,
        weight: mx.array,
        bias: mx.array,
        mask: mx.array,
        k_aux: int,
        shadow: ops.Shadow | None = None,
    ) -> tuple[SparseCode, SparseCode]:
        return ops.topk_encode_masked(x, weight, bias, mask=mask, k=self.k, k_aux=k_aux, shadow=shadow)

    def check(self, d_sae: int) -> None:
        if self.k > d_sae:
            raise ValueError(f"[SAE] k must be in (0, d_sae] but got k={self.k} with d_sae={d_sae}.")

    def _extra_repr(self) -> str:
        return f"k={self.k}"


RULES: dict[str, type[Rule]] = {rule.architecture: rule for rule in (TopK,)}
"""The rules that files know, by architecture."""
