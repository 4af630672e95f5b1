"""Two levels: coarse latents explain the activation, fine ones what they leave over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import mlx.core as mx
import numpy as np

from mlxsae import ops
from mlxsae.code import Code, DenseCode, SparseCode
from mlxsae.sae.copying import copied
from mlxsae.sae.model import SAE
from mlxsae.sae.rule import Encoded, Rule, State, TopK, must_be_rule, positive_int, taken


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
    coarse, fine : rules, both with codes of one kind. tied : the decoder's rows are the encoder's.

    By configuration it is ``SAEConfig(architecture="hierarchical", k=32, rule={"k_coarse": 8, "d_coarse": 1 / 8})``, see
    :class:`Hierarchical`. Files hold it where both rules are TopK.
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
        tied: bool = False,
        dtype: mx.Dtype = mx.float32,
        seed: int | None = None,
    ):
        levels = []
        for name, k, rule in (("coarse", k_coarse, coarse), ("fine", k_fine, fine)):
            if (k is None) == (rule is None):
                raise ValueError(f"[HierarchicalSAE] give either k_{name} or {name} but got {k} and {rule}.")
            levels.append(TopK(k) if rule is None else rule)  # type: ignore[arg-type]
            must_be_rule("HierarchicalSAE", name, levels[-1])
        rule = Hierarchical.of(*levels, d_coarse=d_coarse)
        super().__init__(d_in, d_coarse + d_fine, rule=rule, tied=tied, dtype=dtype, seed=seed)

    @classmethod
    def with_rule(
        cls,
        d_in: int,
        d_sae: int,
        *,
        rule: Hierarchical,
        tied: bool = False,
        dtype: mx.Dtype = mx.float32,
        seed: int | None = None,
    ) -> HierarchicalSAE:
        """One of ``d_sae`` latents in all, split as ``rule`` says."""
        rule = copied(rule)
        rule.prepare(d_in, d_sae)
        widths = rule.d_coarse, d_sae - rule.d_coarse
        return cls(d_in, *widths, coarse=rule.coarse, fine=rule.fine, tied=tied, dtype=dtype, seed=seed)

    @property
    def d_coarse(self) -> int:
        return self.levels.d_coarse

    @property
    def levels(self) -> Hierarchical:
        assert isinstance(self.rule, Hierarchical)
        return self.rule

    def encode(self, x: mx.array) -> Code:
        lead = x.shape[:-1]
        code = self.learn(x.reshape(-1, x.shape[-1]), {}).code
        return type(code)(*(part.reshape(*lead, part.shape[-1]) for part in code))

    def pre_acts(self, x: mx.array) -> mx.array:
        """Of both levels, ``[n, d_sae]`` for ``x [n, d_in]``: the fine level's after what the coarse one explains."""
        return mx.concatenate([mx.addmm(b, inner, w.T) for inner, w, b in self.products(x)], axis=-1)

    def products(self, x: mx.array) -> list[tuple[mx.array, mx.array, mx.array]]:
        inner, _, left = self._coarse(x, self.levels)
        cut, w, b = self.d_coarse, self.encoder.weight, self.encoder.bias
        return [(inner, w[:cut], b[:cut]), (left, w[cut:], b[cut:])]

    def _coarse(self, x: mx.array, levels: Hierarchical) -> tuple[mx.array, Code, mx.array]:
        """What the coarse level sees, its code, and what that leaves to the fine level."""
        cut, inner = self.d_coarse, self.encoder_input(x)
        w_dec = self.decoder.weight
        coarse = levels.coarse.learn(inner, self.encoder.weight[:cut], self.encoder.bias[:cut], {}).code
        known = (
            coarse.values @ w_dec[:cut] if isinstance(coarse, DenseCode) else ops.sparse_decode(coarse, w_dec)
        )
        return inner, coarse, inner - known

    def learn(self, x: mx.array, state: State, *, rule: Rule | None = None) -> Encoded:
        levels = self.levels if rule is None else rule
        assert isinstance(levels, Hierarchical)
        cut, w, b = self.d_coarse, self.encoder.weight, self.encoder.bias
        _, coarse, left = self._coarse(x, levels)
        fine = levels.fine.learn(left, w[cut:], b[cut:], {}).code
        return Encoded(_joined(coarse, fine, cut), state)


class Hierarchical(Rule):
    """The rules of the two levels of a :class:`HierarchicalSAE`, as one module: the ``k_coarse`` largest of the first
    ``d_coarse`` latents, the ``k - k_coarse`` largest of the others. :meth:`of` takes other rules.

    Parameters
    ----------
    k : latents a token of both levels together, at least 2.
    k_coarse : how many of them are coarse; by default a quarter, at least 1.
    d_coarse : number of coarse latents or, below 1, their share of ``d_sae``.

    Raises
    ------
    ValueError, TypeError : a level without latents, or with fewer than it shall keep.
    """

    architecture = "hierarchical"
    own_sae = "HierarchicalSAE"
    PARAMETERS = ("k", "k_coarse", "d_coarse")
    coarse: Rule
    fine: Rule

    def __init__(self, k: int, k_coarse: int | None = None, d_coarse: float = 1 / 8):
        super().__init__()
        k = positive_int("Hierarchical", "k", k)
        self.k = k
        self.k_coarse = (
            max(k // 4, 1) if k_coarse is None else positive_int("Hierarchical", "k_coarse", k_coarse)
        )
        if self.k_coarse >= k:
            raise ValueError(
                f"[Hierarchical] k must be over k_coarse but got k={k} with k_coarse={self.k_coarse}."
            )
        self._split(d_coarse)
        self.coarse, self.fine = TopK(self.k_coarse), TopK(k - self.k_coarse)

    @classmethod
    def of(cls, coarse: Rule, fine: Rule, *, d_coarse: int) -> Self:
        """Of any two rules that carry no state from step to step."""
        for rule in (coarse, fine):
            if rule.initial_state():
                raise ValueError(
                    f"[Hierarchical] a level's rule must carry no state but {type(rule).__name__} does."
                )
        made = cls.__new__(cls)
        Rule.__init__(made)
        made._split(d_coarse)
        made.coarse, made.fine = taken(coarse), taken(fine)
        k = getattr(coarse, "k", None), getattr(fine, "k", None)
        made.k, made.k_coarse = None if None in k else sum(k), k[0]  # type: ignore[arg-type]
        return made

    def _split(self, d_coarse: float) -> None:
        if isinstance(d_coarse, bool) or not d_coarse > 0 or (d_coarse >= 1 and d_coarse != int(d_coarse)):
            raise ValueError(
                f"[Hierarchical] d_coarse must be a positive whole number or a share below 1 but got {d_coarse}."
            )
        self.d_coarse: Any = int(d_coarse) if d_coarse >= 1 else d_coarse

    def prepare(self, d_in: int, d_sae: int) -> None:
        if self.d_coarse < 1:
            self.d_coarse = max(1, round(self.d_coarse * d_sae))
        if self.d_coarse >= d_sae:
            raise ValueError(
                f"[Hierarchical] d_coarse must be below d_sae but got d_coarse={self.d_coarse} with d_sae={d_sae}."
            )
        for name, width in (("coarse", self.d_coarse), ("fine", d_sae - self.d_coarse)):
            if (k := getattr(self[name], "k", None)) is not None and k > width:
                raise ValueError(
                    f"[Hierarchical] k_{name} must be in (0, d_{name}] but got k_{name}={k} with d_{name}={width}."
                )
            self[name].prepare(d_in, width)
        self.d_fine = d_sae - self.d_coarse

    def with_k(self, k: int) -> Hierarchical:
        """Both levels with their shares of another ``k``; what a level has no latents for goes to the other."""
        other = copy.copy(self)
        share = min(max(1, round(self.k_coarse * k / self.k)), max(k - 1, 1))
        other.k_coarse = min(max(share, k - self.d_fine), self.d_coarse)
        other.k = k
        other.coarse = self.coarse.with_k(other.k_coarse)
        other.fine = self.fine.with_k(max(k - other.k_coarse, 1))
        return other

    def with_tf32(self) -> Hierarchical:
        other = copy.copy(self)
        other.coarse, other.fine = self.coarse.with_tf32(), self.fine.with_tf32()
        return other

    def __repr__(self) -> str:
        if type(self.coarse) is TopK and type(self.fine) is TopK:
            return f"Hierarchical({self._extra_repr()})"
        return f"Hierarchical(coarse={self.coarse}, fine={self.fine}, d_coarse={self.d_coarse})"

    @property
    def UNITS(self) -> dict[str, int]:  # type: ignore[override]
        return {
            f"{level}.{name}": power
            for level in ("coarse", "fine")
            for name, power in self[level].UNITS.items()
        }

    def constrain(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {level: self[level].constrain(of) for level, of in parameters.items()}

    def for_raw(
        self,
        parameters: dict[str, Any],
        weight: mx.array,
        read: Callable[[mx.array], mx.array],
        mean: mx.array | None,
    ) -> dict[str, Any]:
        own = {"coarse": weight[: self.d_coarse], "fine": weight[self.d_coarse :]}
        return {level: self[level].for_raw(of, own[level], read, mean) for level, of in parameters.items()}

    def renewed(
        self, parameters: dict[str, Any], dead: mx.array, directions: mx.array, size: float
    ) -> dict[str, Any]:
        found, low = dict(parameters), np.array(dead) < self.d_coarse
        for level, own, first in (("coarse", low, 0), ("fine", ~low, self.d_coarse)):
            if level in found and own.any():
                rows = mx.array(np.flatnonzero(own).astype(np.uint32))
                found[level] = self[level].renewed(found[level], dead[rows] - first, directions[rows], size)
        return found


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
