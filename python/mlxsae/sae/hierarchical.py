"""Two levels: coarse latents explain the activation, fine ones what they leave over."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxsae import ops
from mlxsae.code import Code, DenseCode, SparseCode
from mlxsae.sae.model import SAE
from mlxsae.sae.rule import Encoded, Rule, State, TopK


class HierarchicalSAE(SAE):
    r"""Latents ``[0, d_coarse)`` encode ``x``, the others what those leave over:

    .. math:: z_c = r_c(x W_c + b_c), \quad z_f = r_f((x - z_c W^{dec}_c - b_{dec}) W_f + b_f), \quad
              \hat x = z_c W^{dec}_c + z_f W^{dec}_f + b_{dec}

    where the coarse level sees ``x - b_dec``, as an SAE does. One dictionary, so everything that takes an SAE takes it:
    the code holds both levels, the coarse one first. With ``LossConfig(prefixes=(d_coarse,))`` the coarse level must
    reconstruct by itself.

    Parameters
    ----------
    d_in, d_coarse, d_fine : widths. k_coarse, k_fine : latents a token of each level; short for two TopK rules.
    coarse, fine : rules, both with codes of one kind.
    """

    one_product = False

    def __init__(
        self,
        d_in: int,
        d_coarse: int,
        d_fine: int,
        *,
        k_coarse: int | None = None,
        k_fine: int | None = None,
        coarse: Rule | None = None,
        fine: Rule | None = None,
        dtype: mx.Dtype = mx.float32,
        seed: int | None = None,
    ):
        levels = []
        for name, k, rule, width in (
            ("coarse", k_coarse, coarse, d_coarse),
            ("fine", k_fine, fine, d_fine),
        ):
            if (k is None) == (rule is None):
                raise ValueError(f"[HierarchicalSAE] give either k_{name} or {name} but got {k} and {rule}.")
            levels.append(TopK(k) if rule is None else rule)  # type: ignore[arg-type]
            levels[-1].prepare(d_in, width)
        super().__init__(d_in, d_coarse + d_fine, rule=_Levels(*levels), dtype=dtype, seed=seed)
        self.d_coarse = d_coarse

    @property
    def levels(self) -> _Levels:
        assert isinstance(self.rule, _Levels)
        return self.rule

    def encode(self, x: mx.array) -> Code:
        lead = x.shape[:-1]
        code = self.learn(x.reshape(-1, x.shape[-1]), {}).code
        return type(code)(*(part.reshape(*lead, part.shape[-1]) for part in code))

    def pre_acts(self, x: mx.array) -> mx.array:
        """Of both levels, ``[n, d_sae]`` for ``x [n, d_in]``: the fine level's after what the coarse one explains."""
        inner, _, left = self._coarse(x)
        cut, w, b = self.d_coarse, self.encoder.weight, self.encoder.bias
        each = [mx.addmm(b[:cut], inner, w[:cut].T), mx.addmm(b[cut:], left, w[cut:].T)]
        return mx.concatenate(each, axis=-1)

    def _coarse(self, x: mx.array) -> tuple[mx.array, Code, mx.array]:
        """What the coarse level sees, its code, and what that leaves to the fine level."""
        cut, inner = self.d_coarse, self.encoder_input(x)
        w_dec = self.decoder.weight
        coarse = self.levels.coarse.learn(inner, self.encoder.weight[:cut], self.encoder.bias[:cut], {}).code
        known = (
            coarse.values @ w_dec[:cut] if isinstance(coarse, DenseCode) else ops.sparse_decode(coarse, w_dec)
        )
        return inner, coarse, inner - known

    def learn(self, x: mx.array, state: State, *, rule: Rule | None = None) -> Encoded:
        cut, w, b = self.d_coarse, self.encoder.weight, self.encoder.bias
        _, coarse, left = self._coarse(x)
        fine = self.levels.fine.learn(left, w[cut:], b[cut:], {}).code
        return Encoded(_joined(coarse, fine, cut), state)


class _Levels(Rule):
    """The two rules, as one module."""

    coarse: Rule
    fine: Rule

    def __init__(self, coarse: Rule, fine: Rule):
        super().__init__()
        self.coarse = coarse
        self.fine = fine

    @property
    def UNITS(self) -> dict[str, int]:  # type: ignore[override]
        return {
            f"{level}.{name}": power
            for level in ("coarse", "fine")
            for name, power in self[level].UNITS.items()
        }

    def constrain(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {level: self[level].constrain(of) for level, of in parameters.items()}


def _joined(coarse: Code, fine: Code, cut: int) -> Code:
    if isinstance(coarse, SparseCode) and isinstance(fine, SparseCode):
        return SparseCode(
            mx.concatenate([coarse.values, fine.values], axis=-1),
            mx.concatenate([coarse.indices, fine.indices + cut], axis=-1),
        )
    if isinstance(coarse, DenseCode) and isinstance(fine, DenseCode):
        return DenseCode(mx.concatenate([coarse.values, fine.values], axis=-1))
    raise ValueError(
        "[HierarchicalSAE] both rules must keep k latents a token, or both be dense in training, but their codes are "
        f"{type(coarse).__name__} and {type(fine).__name__}."
    )
