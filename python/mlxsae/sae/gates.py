"""Rules whose latents are dense in training: a gradient reaches what does not fire, or everything fires."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxsae import ops
from mlxsae.code import Code, DenseCode, SparseCodeCSR
from mlxsae.sae.rule import Encoded, Rule, State, mean_of_others, must_have_shape, quantile, with_rows


class ReLU(Rule):
    """Every positive pre-activation (Bricken et al. 2023). Wants a sparsity term: L1, Lp or tanh.

    Latents are dense in training; in use the code comes from one fused pass.
    """

    architecture = "relu"
    takes_auxk = False
    starts_from_data = True  # type: ignore[assignment]

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCodeCSR:
        return ops.threshold_encode(x, weight, bias, threshold=mx.array(0.0))

    def learn(
        self, x: mx.array, weight: mx.array, bias: mx.array, state: State, shadow: ops.Shadow | None = None
    ) -> Encoded:
        pre_acts = mx.addmm(bias, x, weight.T)
        return Encoded(DenseCode(nn.relu(pre_acts)), state, pre_acts)

    def start(self, pre_acts: mx.array, l0: float | None) -> mx.array | None:
        return _bias(pre_acts, l0)


class Activation(Rule):
    """Any elementwise or row-wise function of pre-activations, ``fn(pre_acts [n, d_sae]) -> [n, d_sae]``; a module's
    parameters train with the SAE. A latent fires where it is positive.
    """

    def __init__(self, fn: Callable[[mx.array], mx.array]):
        super().__init__()
        if not callable(fn):
            raise TypeError(f"[Activation] fn must be a function of pre-activations but got {fn!r}.")
        self.fn = fn

    def select(self, pre_acts: mx.array) -> DenseCode:
        acts = self.fn(pre_acts)
        if acts.shape != pre_acts.shape:
            raise ValueError(
                f"[Activation] fn must keep the shape {pre_acts.shape} of pre-activations but gave {acts.shape}."
            )
        return DenseCode(acts)


class Gated(Rule):
    r"""One direction decides whether a latent fires and how strongly, but with a scale and a bias of its own for the
    latter (Rajamanoharan et al. 2024, arXiv 2404.16014):

    .. math:: \pi = x W_{enc} + b_{gate}, \qquad
              f = [\pi > 0] \; \mathrm{relu}(e^{r_{mag}} \, x W_{enc} + b_{mag})

    The encoder's bias is ``b_gate``. The step has no derivative: the gate learns from the terms
    :class:`~mlxsae.loss.GateL1` and :class:`~mlxsae.loss.GateReconstruction`, which the loss must have.
    Parameters: ``r_mag``, ``b_mag``, both ``[d_sae]``.
    """

    architecture = "gated"
    makes_values = True
    takes_auxk = False
    UNITS: ClassVar[dict[str, int]] = {"b_mag": 1}
    starts_from_data = True  # type: ignore[assignment]
    r_mag: mx.array
    b_mag: mx.array

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCodeCSR:
        code = ops.threshold_encode(x, weight, bias, threshold=mx.array(0.0))
        j = code.indices
        values = nn.relu(self._magnitude(code.values - bias[j], self.r_mag[j], self.b_mag[j]))
        return code._replace(values=values.astype(x.dtype))

    def learn(
        self, x: mx.array, weight: mx.array, bias: mx.array, state: State, shadow: ops.Shadow | None = None
    ) -> Encoded:
        along = x @ weight.T
        gate = along + bias
        acts = mx.where(gate > 0, nn.relu(self._magnitude(along, self.r_mag, self.b_mag)), 0)
        return Encoded(DenseCode(acts.astype(x.dtype)), state, gate)

    def start(self, pre_acts: mx.array, l0: float | None) -> mx.array | None:
        return _bias(pre_acts, l0)

    def for_raw(
        self,
        parameters: dict[str, Any],
        weight: mx.array,
        read: Callable[[mx.array], mx.array],
        mean: mx.array | None,
    ) -> dict[str, Any]:
        if mean is None:
            return parameters
        away = mx.exp(parameters["r_mag"]) * (weight @ mean)
        return parameters | {"b_mag": parameters["b_mag"] - away}

    def renewed(
        self, parameters: dict[str, Any], dead: mx.array, directions: mx.array, size: float
    ) -> dict[str, Any]:
        found = dict(parameters)  # without those that are frozen
        if "r_mag" in found:
            found["r_mag"] = with_rows(found["r_mag"], dead, mean_of_others(found["r_mag"], dead))
        if "b_mag" in found:
            found["b_mag"] = with_rows(found["b_mag"], dead, mx.array(0.0))
        return found

    @staticmethod
    def _magnitude(along: mx.array, r_mag: mx.array, b_mag: mx.array) -> mx.array:
        return mx.exp(r_mag) * along + b_mag

    def prepare(self, d_in: int, d_sae: int) -> None:
        for name in ("r_mag", "b_mag"):
            self.setdefault(name, mx.zeros(d_sae))
            must_have_shape(self, name, (d_sae,))


def _bias(pre_acts: mx.array, l0: float | None) -> mx.array | None:
    return None if l0 is None else mx.broadcast_to(-quantile(pre_acts, l0), (pre_acts.shape[-1],))


class SigmoidGated(Rule):
    r"""A soft gate with an encoder of its own, ``gate_weight [d_sae, d_in]`` and ``gate_bias [d_sae]``, that counts where it
    is over ``cut``:

    .. math:: g = \sigma(x W_{gate} + b_{gate}), \qquad f = \mathrm{relu}(x W_{enc} + b_{enc}) \; g \; [g > cut]

    A sigmoid is never 0: without the cut (``cut=0``) about half of all latents fire for every token, however small most of
    them are. The step has no derivative, so a closed gate learns as if it were not cut, by :math:`\sigma'`, and the
    magnitude behind it does not; :class:`~mlxsae.loss.GateMean` pushes gates down. Dense in training and in use.
    """

    architecture = "sigmoid_gated"
    own_gate = True
    takes_auxk = False
    PARAMETERS = ("cut",)
    UNITS: ClassVar[dict[str, int]] = {"gate_weight": -1}
    starts_from_data = True  # type: ignore[assignment]

    def __init__(self, cut: float = 0.5):
        super().__init__()
        if not 0 <= cut < 1:
            raise ValueError(f"[SigmoidGated] cut must be in [0, 1) but got {cut}.")
        self.cut = cut

    def encode(self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None) -> Code:
        return self.learn(x, weight, bias, {}).code

    def learn(
        self, x: mx.array, weight: mx.array, bias: mx.array, state: State, shadow: ops.Shadow | None = None
    ) -> Encoded:
        gate = mx.addmm(self.gate_bias, x, self.gate_weight.T)
        acts, openness = nn.relu(mx.addmm(bias, x, weight.T)), mx.sigmoid(gate)
        behind = mx.stop_gradient(acts) * openness
        closed = behind - mx.stop_gradient(behind)  # 0, with the gate's gradient
        acts = mx.where(openness > self.cut, acts * openness, closed).astype(x.dtype)
        return Encoded(DenseCode(acts), state, gate)

    def start(self, pre_acts: mx.array, l0: float | None) -> mx.array | None:
        if l0 is not None:  # the gate reads what the encoder reads: begin sees to that
            self.gate_bias = mx.broadcast_to(self._at_cut - quantile(pre_acts, l0), self.gate_bias.shape)
        return None

    def prepare(self, d_in: int, d_sae: int) -> None:
        if "gate_weight" not in self:
            self.gate_weight = mx.random.normal((d_sae, d_in), key=mx.random.key(d_sae)) / d_in**0.5
            self.gate_bias = mx.zeros(d_sae)

    def for_raw(
        self,
        parameters: dict[str, Any],
        weight: mx.array,
        read: Callable[[mx.array], mx.array],
        mean: mx.array | None,
    ) -> dict[str, Any]:
        gate, bias = read(parameters["gate_weight"]), parameters["gate_bias"]
        return parameters | {"gate_weight": gate, "gate_bias": bias if mean is None else bias - gate @ mean}

    def renewed(
        self, parameters: dict[str, Any], dead: mx.array, directions: mx.array, size: float
    ) -> dict[str, Any]:
        found = dict(parameters)  # without those that are frozen
        if "gate_weight" in found:
            norm = mean_of_others(mx.linalg.norm(found["gate_weight"], axis=-1), dead)
            found["gate_weight"] = with_rows(found["gate_weight"], dead, directions * (size * norm))
        if "gate_bias" in found:
            found["gate_bias"] = with_rows(found["gate_bias"], dead, mx.array(self._at_cut))
        return found

    @property
    def _at_cut(self) -> float:
        """The gate's pre-activation where it opens; 0 without a cut."""
        return math.log(self.cut / (1 - self.cut)) if self.cut else 0.0
