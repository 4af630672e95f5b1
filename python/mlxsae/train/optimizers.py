"""Optimisers by name, and the learning rate of an optimiser that somebody made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as optim

if TYPE_CHECKING:
    from mlxsae.train.config import OptimizerConfig


class Signum(optim.Optimizer):
    """Steps of one size along the sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434)::

    m = beta m + (1 - beta) g
    w = w - lr (sign(m) + weight_decay w)
    """

    def __init__(self, learning_rate: float | Callable, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum = momentum
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: dict) -> None:
        state["m"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        lr = self.learning_rate.astype(gradient.dtype)
        state["m"] = self.momentum * state["m"] + (1 - self.momentum) * gradient
        return parameter - lr * (mx.sign(state["m"]) + self.weight_decay * parameter)


class _OneRate(optim.MultiOptimizer):
    """Several optimisers under one learning rate, where a user's keep their own."""


def _muon(o: OptimizerConfig) -> optim.Optimizer:
    # Orthogonalised steps are for matrices; the rest is Adam's, as its authors advise.
    matrices = optim.Muon(1.0, momentum=o.betas[0], weight_decay=o.weight_decay)
    return _OneRate([matrices, _adam(o)], [lambda _, parameter: parameter.ndim == 2])


def _adam(o: OptimizerConfig) -> optim.Optimizer:
    return optim.Adam(1.0, list(o.betas), o.eps, bias_correction=True)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optim.Optimizer]] = {
    "adam": _adam,
    "adamw": lambda o: optim.AdamW(1.0, list(o.betas), o.eps, o.weight_decay, bias_correction=True),
    "adamax": lambda o: optim.Adamax(1.0, list(o.betas), o.eps),
    "adagrad": lambda o: optim.Adagrad(1.0, o.eps),
    "adadelta": lambda o: optim.AdaDelta(1.0, o.betas[1], o.eps),
    "adafactor": lambda o: optim.Adafactor(
        1.0, scale_parameter=False, relative_step=False, weight_decay=o.weight_decay
    ),
    "rmsprop": lambda o: optim.RMSprop(1.0, o.betas[1], o.eps),
    "sgd": lambda o: optim.SGD(1.0, momentum=o.betas[0], weight_decay=o.weight_decay),
    "lion": lambda o: optim.Lion(1.0, list(o.betas), o.weight_decay),
    "muon": _muon,
    "signum": lambda o: Signum(1.0, o.betas[0], o.weight_decay),
}
"""MLX's, and Signum. ``betas[0]`` is the momentum of those that have one, ``betas[1]`` the decay of their second
moment. Their learning rate is set in every step."""

WITH_WEIGHT_DECAY = ("adafactor", "adamw", "lion", "muon", "sgd", "signum")


def set_learning_rate(optimizer: optim.Optimizer, lr: mx.array) -> None:
    """For the next step. The parts of a user's ``optim.MultiOptimizer`` keep their own rates and schedules."""
    if isinstance(optimizer, _OneRate):
        for part in optimizer.optimizers:
            set_learning_rate(part, lr)
    elif not isinstance(optimizer, optim.MultiOptimizer):
        optimizer.state["learning_rate"] = lr


def emptied(optimizer: optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser that holds nothing: what stays in it would be a second copy of the moments."""
    if isinstance(optimizer, optim.MultiOptimizer):
        return {"states": [emptied(part) for part in optimizer.optimizers]}
    return {}


def split_schedule(optimizer: optim.Optimizer) -> tuple[optim.Optimizer, Callable[[int], float]]:
    """A copy of ``optimizer`` that :func:`set_learning_rate` drives, and its rate as a function of the step.

    MLX evaluates a schedule on an array that hangs on the step before: to read it, or to branch on it as in ``if step <
    1000``, would wait for the device each time. Here it gets its step from the host. Of a ``MultiOptimizer`` it is the
    first part's rate, and nothing but a report.
    """
    own = copy.deepcopy(optimizer)
    first: Any = own
    while isinstance(first, optim.MultiOptimizer):
        first = first.optimizers[0]
    schedule = first._schedulers.get("learning_rate")
    if first is own:
        own._schedulers.pop("learning_rate", None)
    if schedule is None:
        constant = float(first.learning_rate)
        return own, lambda step: constant
    host = mx.new_stream(mx.cpu)

    def at(step: int) -> float:
        with mx.stream(host):
            return float(schedule(mx.array(step)))

    return own, at
