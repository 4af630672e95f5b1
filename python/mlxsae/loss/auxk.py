r"""AuxK: dead latents learn to explain what the living ones leave over (Gao et al. 2024, arXiv 2406.04093).

From the pre-activations ``p`` of dead latents the ``k_aux`` largest are decoded without bias and compared
with the detached residual:

.. math:: e = sg(y - \hat y), \quad \hat e = \sum_{i \in top(p_{dead})} a_i W^{dec}_i, \quad L = s \cdot
dist(\hat e, e)

Systems agree on this and on nothing else. The presets name their choices (k is the full ``k_aux``):

==================== ============= ================================== ======================== ====== ======
preset               acts a_i      dist                               scale s                  b_dec  weight
==================== ============= ================================== ======================== ====== ======
openai               relu(p_i)     sum (ê-e)^2 / sum (e - mean e)^2   1                        yes    1/32
dictionary_learning  relu(p_i)     sum (ê-e)^2 / sum (e - mean e)^2   1                        no     1/32
sparsify             relu(p_i)     sum (ê-e)^2 / sum (y - mean y)^2   min(n_dead / k, 1)       no     1/32
saelens              p_i, signed   mean_n sum_d (ê-e)^2               min(n_dead / k, 1)       no     1
weakest              relu(p_i)     sum (ê-g)^2 / sum (g - mean g)^2   1                        no     1/32
==================== ============= ================================== ======================== ====== ======

``weakest`` is ours. Where the living explain nearly all, latents that learn the residual e stay as small as it is and never
win a place among the selected. Here the dead also learn to do what the weakest of the selected do:

.. math:: g = e + sg\Big(\sum_{i:\ a_i < \bar a} a_i W^{dec}_i\Big)

with the sum over the selected and :math:`\bar a` the mean of all values that fire in the batch.

Means and sums run over the batch. Dead are latents that were silent for long before the batch (as in
SAELens), so that the batch's own product can select among them; one that fires in it is in both codes.
``b_dec``: OpenAI adds it to both sides but detaches one, so it cancels in
the value and yet receives a gradient as the decoder's bias. In every preset the gradient reaches decoder and
encoder at the chosen dead latents and nowhere else (sparsify 1.3.3 itself sends the encoder none). With no
dead latent the term and its gradient are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlxsae import ops
from mlxsae.code import AnyCode, DenseCode, SparseCode, detached
from mlxsae.loss.compose import Forward
from mlxsae.loss.reconstruction import nonzero, sum_about_mean
from mlxsae.sae import SAE


class Preset(NamedTuple):
    """One row of the table above."""

    weight: float
    signed: bool = False
    relative_to: str | None = "residual"
    scaled: bool = False
    bias: bool = False
    weakest: bool = False


AUXK_PRESETS: dict[str, Preset] = {
    "openai": Preset(1 / 32, bias=True),
    "dictionary_learning": Preset(1 / 32),
    "sparsify": Preset(1 / 32, relative_to="target", scaled=True),
    "saelens": Preset(1.0, signed=True, relative_to=None, scaled=True),
    "weakest": Preset(1 / 32, weakest=True),
}


@dataclass(frozen=True)
class AuxK:
    """The term; called with a :class:`~mlxsae.loss.Forward` whose ``dead [d_sae]`` marks dead latents.

    ``k_aux`` is capped at ``d_sae``; ``d_in / 2`` is customary.
    """

    k_aux: int
    preset: str = "dictionary_learning"

    def __post_init__(self) -> None:
        if self.preset not in AUXK_PRESETS:
            raise ValueError(f"[AuxK] preset must be one of {sorted(AUXK_PRESETS)} but got {self.preset!r}.")
        if self.k_aux <= 0:
            raise ValueError(f"[AuxK] k_aux must be positive but got {self.k_aux}.")

    @property
    def fused(self) -> bool:
        """Whether the term acts through ``relu``'d latents alone, as the one-pass update wants it."""
        preset = AUXK_PRESETS[self.preset]
        return not preset.signed and not preset.bias

    def __call__(self, forward: Forward) -> mx.array:
        sae, dead = forward.sae, _dead(forward)
        if sae.products(forward.x):
            aux_hat = ops.sparse_decode(self.code(sae, forward.x, dead), sae.decoder.weight)
        else:
            aux_hat = sae.written(self.dense_code(sae, forward.x, dead))
        if AUXK_PRESETS[self.preset].bias:
            aux_hat = aux_hat + (sae.decoder.bias - mx.stop_gradient(sae.decoder.bias))
        aux_hat = forward.as_target(aux_hat)
        goal = self.goal(forward.y - forward.y_hat, forward.code, lambda code: sae.decode(code, forward.x))
        return self.distance(forward.y, goal, aux_hat, dead)

    def code(self, sae: SAE, x: mx.array, dead: mx.array) -> SparseCode:
        """The ``k_aux`` largest pre-activations among ``dead [d_sae]`` of each token; slots past their number
        are inert.
        """
        parts, first = [], 0
        for inner, weight, bias in sae.products(x):
            own = dead[first : first + weight.shape[0]]
            code = self._of_product(inner, weight, bias, own)
            parts.append((code.values, code.indices + first if first else code.indices))
            first += weight.shape[0]
        if len(parts) == 1:
            return SparseCode(*parts[0])
        values, indices = (mx.concatenate(list(each), axis=-1) for each in zip(*parts, strict=True))
        if (k := min(self.k_aux, sae.d_sae)) < indices.shape[-1]:
            ranked = mx.where(dead[indices], mx.stop_gradient(values), -mx.inf)
            places = mx.sort(mx.argpartition(-ranked, k - 1, axis=-1)[..., :k], axis=-1)
            values, indices = (mx.take_along_axis(a, places, axis=-1) for a in (values, indices))
        return SparseCode(values, indices)

    def _of_product(self, inner: mx.array, weight: mx.array, bias: mx.array, dead: mx.array) -> SparseCode:
        # A bias at the bottom of the range keeps the living out of the selection and leaves the product as it
        # is.
        lowest = mx.array(mx.finfo(bias.dtype).min, bias.dtype)
        k = min(self.k_aux, weight.shape[0])
        code = ops.topk_encode(inner, weight, mx.where(dead, bias, lowest), k=k)
        if not AUXK_PRESETS[self.preset].signed:
            return code
        indices = mx.stop_gradient(code.indices)
        pre_acts = ops.gather_dot(inner, weight, indices) + bias[indices]
        return SparseCode(mx.where(dead[indices], pre_acts, mx.zeros_like(pre_acts)), indices)

    def dense_code(self, sae: SAE, x: mx.array, dead: mx.array) -> DenseCode:
        """:meth:`code` for an SAE whose decoder is not one matrix, from dense pre-activations."""
        pre_acts = sae.pre_acts(x)
        k = min(self.k_aux, sae.d_sae)
        ranked = mx.stop_gradient(mx.where(dead, pre_acts, -mx.inf))
        places = mx.argpartition(-ranked, k - 1, axis=-1)[..., :k]
        chosen = mx.put_along_axis(mx.zeros_like(ranked), places, mx.ones(places.shape), axis=-1)
        acts = pre_acts if AUXK_PRESETS[self.preset].signed else mx.maximum(pre_acts, 0)
        return DenseCode(mx.where((chosen > 0) & dead, acts, 0))

    def goal(self, residual: mx.array, code: AnyCode, decode: Callable[[AnyCode], mx.array]) -> mx.array:
        """What the dead are to explain, given the residual ``y - y_hat``, the code and an affine ``decode`` of codes: a
        constant for the gradient.
        """
        residual = mx.stop_gradient(residual)
        if not AUXK_PRESETS[self.preset].weakest:
            return residual
        code = detached(code)
        values = code.values
        weak = values * (values < values.sum() / mx.maximum((values > 0).sum(), 1))
        parts = decode(code._replace(values=weak)), decode(code._replace(values=mx.zeros_like(values)))
        return residual + mx.stop_gradient(parts[0] - parts[1])

    def distance(self, y: mx.array, goal: mx.array, aux_hat: mx.array, dead: mx.array) -> mx.array:
        """``s * dist(aux_hat, goal)``; differentiable in ``aux_hat`` only."""
        error = mx.square(aux_hat - goal).sum()
        return error * self.factor(y, goal, dead).astype(error.dtype)

    def factor(self, y: mx.array, goal: mx.array, dead: mx.array) -> mx.array:
        """The number ``c`` in ``s * dist(ê, e) = c * sum (ê - e)^2``, given ``±`` the goal ``e``."""
        preset = AUXK_PRESETS[self.preset]
        n_dead = dead.sum()
        scale = mx.minimum(n_dead / self.k_aux, 1) if preset.scaled else (n_dead > 0).astype(mx.float32)
        if preset.relative_to is None:
            return scale / y.shape[0]
        return scale / nonzero(sum_about_mean(goal if preset.relative_to == "residual" else y))


def _dead(forward: Forward) -> mx.array:
    if forward.dead is None:
        raise ValueError("[AuxK] the forward pass must say which latents are dead but has dead=None.")
    return forward.dead
