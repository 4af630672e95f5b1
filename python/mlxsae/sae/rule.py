"""Rules: which latents of a token stay.

A new architecture is one class here. A rule with a fused op overrides :meth:`Rule.encode`; any other gives
:meth:`Rule.select`, its definition on dense pre-activations. A rule that does something else in training than in use, or
learns something from what it sees, overrides :meth:`Rule.learn`. A rule may own parameters (thresholds): it is a module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae import ops
from mlxsae.code import Code, DenseCode, Sparse, SparseCode, SparseCodeCSR
from mlxsae.sae.copying import copied
from mlxsae.sae.straight_through import jump_relu

State = dict[str, mx.array]
"""What a rule carries from one training step to the next, beside its parameters."""


class Encoded(NamedTuple):
    """What a rule makes of a training batch. ``pre_acts [n, d_sae]``, which decide what fires, where the rule made them,
    else None. (Of an SAE that ranks by decoder norm, :meth:`SAE.learn` gives them before they are multiplied by it.)
    """

    code: Code
    state: State
    pre_acts: mx.array | None = None


class Rule(nn.Module):
    """What turns ``x @ W_enc + b_enc`` into a code."""

    architecture: ClassVar[str] = ""
    """The name in configurations and on the command line; empty for rules that files do not know."""
    fused: ClassVar[bool] = False
    """True where the code of :meth:`learn` is sparse, its values are the relu'd pre-activations at its places, and nothing
    else in the rule depends on a parameter: all that the one-pass update needs to know."""
    certified: ClassVar[bool] = False
    """True where the fused op takes the encoder's shadow, operands of 16 bits, and ``tf32``."""
    makes_values: ClassVar[bool] = False
    """Whether the values of a sparse code are more than the pre-activations at its places: a magnitude of their own, or one
    that has a threshold's gradient."""
    own_gate: ClassVar[bool] = False
    """Whether what decides is a product of the rule's own weights with the input, and not the encoder's."""
    own_sae: ClassVar[str] = ""
    """The class of SAE that the rule is a part of; empty where any SAE may have it."""
    takes_auxk: ClassVar[bool] = True
    """Whether AuxK is part of the loss unless it says otherwise: not where a penalty alone keeps latents from firing."""
    tf32 = False
    """Whether the GPU's float32 product decides as it is (:meth:`with_tf32`)."""
    PARAMETERS: ClassVar[tuple[str, ...]] = ()
    """The constructor's arguments, each also an attribute that JSON can hold."""
    UNITS: ClassVar[dict[str, int]] = {}
    """Parameters that are measured like pre-activations, with the power in which the scale of the input enters."""

    def encode(self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None) -> Code:
        """Code of ``x [n, d_in]`` under feature-major ``weight [d_sae, d_in]`` and ``bias [d_sae]``, as the finished SAE
        gives it: that of a token depends on no other token.

        ``shadow = ops.encoder_shadow(weight)`` lets a ``certified`` rule screen in 16 bits; the code has the same bits.
        """
        return self.select(mx.addmm(bias, x, weight.T))

    def learn(
        self, x: mx.array, weight: mx.array, bias: mx.array, state: State, shadow: ops.Shadow | None = None
    ) -> Encoded:
        """The code in training, and the next state. By default that of :meth:`encode`, or :meth:`select`'s with the
        pre-activations it was made from.
        """
        if type(self).encode is not Rule.encode:
            return Encoded(self.encode(x, weight, bias, shadow), state)
        pre_acts = mx.addmm(bias, x, weight.T)
        return Encoded(self.select(pre_acts), state, pre_acts)

    def learn_masked(
        self,
        x: mx.array,
        weight: mx.array,
        bias: mx.array,
        state: State,
        mask: mx.array,
        k_aux: int,
        shadow: ops.Shadow | None = None,
    ) -> tuple[Encoded, Sparse]:
        """:meth:`learn`, and the ``k_aux`` largest pre-activations among ``mask [d_sae]``, then relu (AuxK).

        Without an op that does both, the second is a product of its own with the masked rows: as dear as they are many.
        Waits for ``mask``.
        """
        return self.learn(x, weight, bias, state, shadow), _topk_among(x, weight, bias, mask, k_aux)

    def select(self, pre_acts: mx.array) -> Code:
        """Code of dense ``pre_acts [n, d_sae]``."""
        raise NotImplementedError(f"[{type(self).__name__}] a rule must define select or encode.")

    def initial_state(self) -> State:
        """The state before the first step."""
        return {}

    def finish(self, state: State, scale: float) -> None:
        """Take from ``state`` what the finished rule needs; training saw pre-activations times ``scale``."""

    def thresholds(self) -> mx.array | None:
        """Learned thresholds ``[d_sae]`` of a rule whose latents fire wherever the pre-activation is over its own; None for
        others."""
        return None

    @property
    def starts_from_data(self) -> bool:
        """Whether an SAE of this rule begins training by :meth:`start`: it chooses by a threshold, which was not trained yet."""
        return False

    def start(self, pre_acts: mx.array, l0: float | None) -> mx.array | None:
        """Set what depends on the data, from ``pre_acts [m, d_sae]`` of a first sample without a bias, such that ``l0``
        latents a token fire. Returns the encoder's bias ``[d_sae]`` for that; None where it stays 0.
        """
        return None

    def rescale(self, factor: mx.array) -> None:
        """Follow pre-activations that are ``factor`` times what they were."""

    def constrain(self, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """The rule's parameters, back where they must lie, after an optimiser step."""
        return parameters

    def for_raw(
        self,
        parameters: dict[str, Any],
        weight: mx.array,
        read: Callable[[mx.array], mx.array],
        mean: mx.array | None,
    ) -> dict[str, Any]:
        """The rule's parameters for raw activations after training on normalised ones, so that latents stay what they are:
        ``read(rows)`` is what rows that read the input become, ``weight`` the encoder's already, ``mean [d_in]`` what the
        input is off by then, None where ``b_dec`` sees to it. A rule that reads its input by itself, or takes the product
        with the encoder without its bias, must follow; pre-activations do not change.
        """
        return parameters

    def renewed(
        self, parameters: dict[str, Any], dead: mx.array, directions: mx.array, size: float
    ) -> dict[str, Any]:
        """The rule's parameters where the latents ``dead [m]`` are made anew (resampling), their encoder rows along unit
        ``directions [m, d_in]`` at ``size`` times the living's norm and their biases 0: what kept them silent must go.
        """
        return parameters

    def with_k(self, k: int) -> Rule:
        """The rule with another ``k`` (annealing); ValueError of a rule that cannot."""
        other = copy.copy(self)
        other.k = k
        return other

    def with_tf32(self) -> Rule:
        """The rule on whatever the GPU's float32 product gives (``precision="tf32"``)."""
        other = copy.copy(self)
        other.tf32 = True
        return other

    def must_be_for(self, sae: type) -> None:
        """Raise ``ValueError`` where the rule is a part of another class of SAE."""
        if self.own_sae not in ("", sae.__name__):
            raise ValueError(
                f"[SAE] the rule {type(self).__name__} must be in a {self.own_sae} but is in a {sae.__name__}."
            )

    def prepare(self, d_in: int, d_sae: int) -> None:
        """Make the parameters for ``d_sae`` latents of ``d_in`` inputs; raise ``ValueError`` where the rule does not fit them."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: ``type(rule)(**rule.config())`` is the rule without its parameters."""
        return {name: getattr(self, name) for name in self.PARAMETERS}

    def metrics(self, state: State) -> dict[str, mx.array]:
        """What of the state is worth watching, as scalars."""
        return {}

    def _extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


R = TypeVar("R", bound=Rule)


class TopK(Rule):
    """The ``k`` largest pre-activations of each token, then relu (Gao et al. 2024, arXiv 2406.04093).

    Selection is on float32 pre-activations, ties go to the lowest index; the slots of a token ascend
    by index. A token with fewer than ``k`` positive pre-activations has slots of value 0, which neither
    count as fired nor carry a gradient.
    """

    architecture = "topk"
    fused = True
    certified = True
    PARAMETERS = ("k",)

    def __init__(self, k: int):
        super().__init__()
        self.k = positive_int("TopK", "k", k)

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCode:
        return ops.topk_encode(x, weight, bias, k=self.k, shadow=shadow, tf32=self.tf32)

    def learn_masked(
        self,
        x: mx.array,
        weight: mx.array,
        bias: mx.array,
        state: State,
        mask: mx.array,
        k_aux: int,
        shadow: ops.Shadow | None = None,
    ) -> tuple[Encoded, Sparse]:
        code, aux = ops.topk_encode_masked(
            x, weight, bias, mask=mask, k=self.k, k_aux=k_aux, shadow=shadow, tf32=self.tf32
        )
        return Encoded(code, state), aux

    def prepare(self, d_in: int, d_sae: int) -> None:
        at_most_d_sae(self.k, d_sae)


class BatchTopK(Rule):
    r"""The ``k n`` largest pre-activations of a batch of ``n`` tokens, then relu (Bussmann et al. 2024, arXiv 2412.06410):
    ``k`` a token on average, more where a token needs more.

    In use a token must not depend on its neighbours: every pre-activation over ``threshold`` stays, a JumpReLU. Training
    estimates the threshold as the mean of each batch's smallest kept value :math:`\theta_t`, newer batches weighing more,
    and without the bias towards its start that a plain moving average has:

    .. math:: \theta = \frac{\sum_t \beta^{T-t} \theta_t}{\sum_t \beta^{T-t}}

    How many latents then fire is measured, not promised: ``metrics.evaluate(sae, ...)["l0"]``.

    Parameters
    ----------
    k : mean number of latents a token.
    threshold : None until trained or :func:`calibrate`d; until then :meth:`encode` takes the ``k n`` largest of what it
        is given.
    decay : :math:`\beta`. Of a batch's ``k n`` values the smallest says its threshold within a percent, so ten batches are
        enough; a longer memory lags behind while thresholds still fall, and a short run ends with too few latents.
    """

    architecture = "batchtopk"
    fused = True
    certified = True
    PARAMETERS = ("k", "threshold", "decay")

    def __init__(self, k: int, threshold: float | None = None, decay: float = 0.9):
        super().__init__()
        self.k = positive_int("BatchTopK", "k", k)
        self.threshold = threshold
        if not 0 <= decay < 1:
            raise ValueError(f"[BatchTopK] decay must be in [0, 1) but got {decay}.")
        self.decay = decay

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCodeCSR:
        if self.threshold is None:
            return ops.batch_topk_encode(x, weight, bias, k=self.k)[0]
        return ops.threshold_encode(x, weight, bias, threshold=mx.array(self.threshold))

    def learn(
        self, x: mx.array, weight: mx.array, bias: mx.array, state: State, shadow: ops.Shadow | None = None
    ) -> Encoded:
        code, threshold = ops.batch_topk_encode(
            x, weight, bias, k=self.k, hint=state["last"], shadow=shadow, tf32=self.tf32
        )
        threshold = mx.stop_gradient(threshold)
        return Encoded(
            code,
            {
                "last": threshold,
                "sum": self.decay * state["sum"] + threshold,
                "weight": self.decay * state["weight"] + 1,
            },
        )

    def initial_state(self) -> State:
        return {name: mx.array(0.0) for name in ("last", "sum", "weight")}

    def finish(self, state: State, scale: float) -> None:
        weight = state["weight"].item()
        if weight > 0:  # type: ignore[operator]
            self.threshold = state["sum"].item() / weight / scale  # type: ignore[operator]

    def prepare(self, d_in: int, d_sae: int) -> None:
        at_most_d_sae(self.k, d_sae)

    def metrics(self, state: State) -> dict[str, mx.array]:
        return {"threshold": state["sum"] / state["weight"]}


_FIRST_THRESHOLD = 0.01


class JumpReLU(Rule):
    r"""Every pre-activation over a learned threshold of its latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

    .. math:: f_j = z_j \, [z_j > \theta_j], \qquad \theta_j \ge 0

    In training latents are dense and the threshold learns by the pseudo-derivatives of :mod:`mlxsae.sae.straight_through`;
    in use the code comes from one fused pass. Needs a loss term that holds L0 down.

    Parameters
    ----------
    k : the mean number of latents a token that the loss aims at; None where the loss does not ask.
    bandwidth : width of the window around the threshold that gives its gradient, in units of the activations trained on.
    initial_threshold : where thresholds start. None starts training with thresholds of one ``bandwidth`` and biases under
        which ``k`` latents a token fire on a first sample (0.01 and 0 without a ``k``): from far below, thresholds whose
        gradient is that of a narrow window do not arrive in a short run, and thresholds of many bandwidths have a
        gradient that is mostly noise.
    through_input : whether that gradient also goes to the pre-activations (Anthropic, January 2025).

    ``threshold [d_sae]`` is float32 whatever the type of the weights: steps of a small learning rate vanish in 16 bits.
    """

    architecture = "jumprelu"
    PARAMETERS = ("k", "bandwidth", "initial_threshold", "through_input")
    UNITS: ClassVar[dict[str, int]] = {"threshold": 1}

    def __init__(
        self,
        k: int | None = None,
        bandwidth: float = 0.5,
        initial_threshold: float | None = None,
        through_input: bool = True,
    ):
        super().__init__()
        self.k = None if k is None else positive_int("JumpReLU", "k", k)
        for name, value, least in (
            ("bandwidth", bandwidth, 1e-12),
            ("initial_threshold", initial_threshold, 0),
        ):
            if value is not None and not value >= least:
                raise ValueError(
                    f"[JumpReLU] {name} must be {'positive' if least else 'at least 0'} but got {value}."
                )
        self.bandwidth, self.initial_threshold = bandwidth, initial_threshold
        self.through_input = through_input

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCodeCSR:
        return ops.threshold_encode(x, weight, bias, threshold=self.threshold)

    def learn(
        self, x: mx.array, weight: mx.array, bias: mx.array, state: State, shadow: ops.Shadow | None = None
    ) -> Encoded:
        pre_acts = mx.addmm(bias, x, weight.T)
        acts = jump_relu(pre_acts, self.threshold, bandwidth=self.bandwidth, through_input=self.through_input)
        return Encoded(DenseCode(acts), state, pre_acts)

    def constrain(self, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        return parameters | {"threshold": mx.maximum(parameters["threshold"], 0)}

    def renewed(
        self, parameters: dict[str, Any], dead: mx.array, directions: mx.array, size: float
    ) -> dict[str, Any]:
        return _renewed_threshold(parameters, dead, size)

    def prepare(self, d_in: int, d_sae: int) -> None:
        if self.k is not None:
            at_most_d_sae(self.k, d_sae)
        if "threshold" not in self:
            first = _FIRST_THRESHOLD if self.initial_threshold is None else self.initial_threshold
            self.threshold = mx.full(d_sae, first, mx.float32)
        must_have_shape(self, "threshold", (d_sae,))

    def thresholds(self) -> mx.array:
        return self.threshold

    def with_k(self, k: int) -> Rule:
        raise ValueError(f"[JumpReLU] k must not be annealed, since only the loss aims at it, but got k={k}.")

    @property
    def starts_from_data(self) -> bool:
        waits = self.initial_threshold is None and self.k is not None
        return waits and bool((self.threshold == mx.array(_FIRST_THRESHOLD)).all())

    def start(self, pre_acts: mx.array, l0: float | None) -> mx.array | None:
        wanted = quantile(pre_acts, self.k if l0 is None else l0)  # type: ignore[arg-type]
        first = mx.minimum(wanted, self.bandwidth)
        self.threshold = mx.broadcast_to(first, self.threshold.shape)
        return mx.broadcast_to(first - wanted, (pre_acts.shape[-1],))

    def rescale(self, factor: mx.array) -> None:
        self.threshold = self.threshold * factor

    @classmethod
    def of(cls, threshold: mx.array, **options: Any) -> Self:
        """A JumpReLU with given thresholds ``[d_sae]``."""
        rule = cls(**options)
        rule.threshold = threshold.astype(mx.float32)
        return rule


class TopKJumpReLU(Rule):
    r"""The ``k`` largest pre-activations of each token, and of them those over a learned threshold of their latent: at most
    ``k``, fewer where fewer stand out.

    .. math:: f_j = z_j \, [j \in \mathrm{top}_k(z)] \, [z_j > \theta_j], \qquad \theta_j \ge 0

    Sparse in training too: the threshold's pseudo-derivative comes from the selected pre-activations near it. The main
    loss alone lowers thresholds; a sparsity term (L1, tanh) raises them. ``initial_threshold`` is for pre-activations as
    random unit rows make them; training begins with an encoder, and thresholds, of another size.
    """

    architecture = "topk_jumprelu"
    makes_values = True
    PARAMETERS = ("k", "bandwidth", "initial_threshold")
    UNITS: ClassVar[dict[str, int]] = {"threshold": 1}
    starts_from_data = True  # type: ignore[assignment]

    def __init__(self, k: int = 100, bandwidth: float = 0.05, initial_threshold: float = 0.1):
        super().__init__()
        self.k = positive_int("TopKJumpReLU", "k", k)
        if not (bandwidth > 0 and initial_threshold >= 0):
            raise ValueError(
                "[TopKJumpReLU] bandwidth must be positive and initial_threshold at least 0 but got "
                f"{bandwidth} and {initial_threshold}."
            )
        self.bandwidth, self.initial_threshold = bandwidth, initial_threshold

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCode:
        code = ops.topk_encode(x, weight, bias, k=self.k)
        threshold = self.threshold[code.indices]
        return code._replace(values=jump_relu(code.values, threshold, bandwidth=self.bandwidth))

    def constrain(self, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        return parameters | {"threshold": mx.maximum(parameters["threshold"], 0)}

    def renewed(
        self, parameters: dict[str, Any], dead: mx.array, directions: mx.array, size: float
    ) -> dict[str, Any]:
        return _renewed_threshold(parameters, dead, size)

    def rescale(self, factor: mx.array) -> None:
        self.threshold = self.threshold * factor

    def prepare(self, d_in: int, d_sae: int) -> None:
        at_most_d_sae(self.k, d_sae)
        if "threshold" not in self:
            self.threshold = mx.full(d_sae, self.initial_threshold, mx.float32)
        must_have_shape(self, "threshold", (d_sae,))


class GroupMax(Rule):
    """The largest of each of ``k`` equal groups of neighbouring latents, then relu (sparsify): TopK without a sort, at the
    price that two latents of a group never fire together. ``d_sae`` must be a multiple of ``k``.
    """

    architecture = "groupmax"
    fused = True
    PARAMETERS = ("k",)

    def __init__(self, k: int):
        super().__init__()
        self.k = positive_int("GroupMax", "k", k)

    def encode(
        self, x: mx.array, weight: mx.array, bias: mx.array, shadow: ops.Shadow | None = None
    ) -> SparseCode:
        if x.shape[0] == 0:  # argmax takes nothing empty
            return SparseCode(mx.zeros((0, self.k), x.dtype), mx.zeros((0, self.k), mx.uint32))
        groups = mx.stop_gradient(mx.addmm(bias, x, weight.T)).reshape(x.shape[0], self.k, -1)
        begins = mx.arange(self.k, dtype=mx.uint32) * groups.shape[-1]
        indices = mx.argmax(groups, axis=-1) + begins
        return SparseCode(nn.relu(ops.gather_dot(x, weight, indices) + bias[indices]), indices)

    def with_k(self, k: int) -> Rule:
        raise ValueError(f"[GroupMax] k must not be annealed, since it must divide d_sae, but got k={k}.")

    def prepare(self, d_in: int, d_sae: int) -> None:
        if d_sae % self.k:
            raise ValueError(
                f"[GroupMax] d_sae must be a multiple of k but got d_sae={d_sae} with k={self.k}."
            )


def _topk_among(x: mx.array, weight: mx.array, bias: mx.array, mask: mx.array, k: int) -> SparseCode:
    """The ``k`` largest pre-activations among ``mask``, by a product with these rows alone."""
    rows = mx.array(np.flatnonzero(np.array(mask)).astype(np.uint32))
    n_rows = rows.size
    if n_rows == 0:
        return SparseCode(mx.zeros((x.shape[0], 1)), mx.zeros((x.shape[0], 1), mx.uint32))
    code = ops.topk_encode(x, weight[rows], bias[rows], k=min(k, n_rows))
    return SparseCode(code.values, rows[code.indices])


def quantile(pre_acts: mx.array, l0: float) -> mx.array:
    """What ``l0`` of ``pre_acts [m, d_sae]`` a row reach, at least 0."""
    flat = mx.sort(pre_acts.astype(mx.float32).flatten())
    place = flat.size - min(max(round(l0 * pre_acts.shape[0]), 1), flat.size)
    return mx.maximum(flat[place], 0)


def with_rows(a: mx.array, rows: mx.array, new: mx.array) -> mx.array:
    """``a [n, ...]`` with ``new [m, ...]`` in its ``rows [m]``."""
    places = mx.broadcast_to(rows.reshape(-1, *(1,) * (a.ndim - 1)), (rows.shape[0], *a.shape[1:]))
    return mx.put_along_axis(a, places, mx.broadcast_to(new, places.shape).astype(a.dtype), axis=0)


def mean_of_others(a: mx.array, rows: mx.array) -> mx.array:
    """The mean of ``a [n]`` outside ``rows [m]``; of all of it where none is outside."""
    weight = mx.ones(a.shape[0]).at[rows].add(-1.0)
    weight = weight if rows.shape[0] < a.shape[0] else mx.ones(a.shape[0])
    return (a * weight).sum() / weight.sum()


def _renewed_threshold(parameters: dict[str, Any], dead: mx.array, size: float) -> dict[str, Any]:
    if "threshold" not in parameters:  # frozen
        return parameters
    threshold = parameters["threshold"]
    return parameters | {"threshold": with_rows(threshold, dead, size * mean_of_others(threshold, dead))}


def positive_int(who: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"[{who}] {name} must be an int but got {type(value).__name__}.")
    if value <= 0:
        raise ValueError(f"[{who}] {name} must be positive but got {name}={value}.")
    return value


def taken(rule: R) -> R:
    """The rule as a part of one SAE. Thresholds are an SAE's own: a rule that another has already is copied, as it is."""
    if rule.__dict__.get("_taken", False):
        rule = copied(rule)
    rule._taken = True
    return rule


def must_be_rule(who: str, name: str, value: Any) -> None:
    if not isinstance(value, Rule):
        raise TypeError(f"[{who}] {name} must be a rule, such as TopK(8), but got {value!r}.")


def must_have_shape(rule: Rule, name: str, shape: tuple[int, ...]) -> None:
    if rule[name].shape != shape:
        raise ValueError(
            f"[{type(rule).__name__}] {name} must have shape {shape} but got {rule[name].shape}."
        )


def at_most_d_sae(k: int, d_sae: int) -> None:
    if k > d_sae:
        raise ValueError(f"[SAE] k must be in (0, d_sae] but got k={k} with d_sae={d_sae}.")
