"""The weight of a sparsity penalty that brings L0 where it is wanted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mlxsae.train.callbacks import Callback

if TYPE_CHECKING:
    from mlxsae.train.loop import Run

_EVERY = 10  # steps: as often as the trainer looks at the device anyway


class SparsityController(Callback):
    r"""A proportional and integral controller of :math:`\ln factor`: every ten steps, from the L0 of the batch,

    .. math:: e = \ln(L_0 / target) \in [-\ln 4, \ln 4], \quad I \leftarrow I + g e, \quad \ln factor = I + h e

    L0 answers a weight with a delay of some hundred steps: a gain ``g`` much over the default's makes both swing, which the
    ``damping`` h holds down. The bounds on e keep dense steps from winding it up. Runs of 300 steps come within a tenth of
    the target if they begin there (:func:`~mlxsae.train.initial.begin`).
    """

    def __init__(self, target: float, gain: float = 0.6, damping: float = 2.0):
        if not (target > 0 and gain > 0 and damping >= 0):
            raise ValueError(
                "[SparsityController] target and gain must be positive and damping at least 0 but got "
                f"{target}, {gain} and {damping}."
            )
        self.target, self.gain, self.damping = target, gain, damping
        self.factor, self._integral = 1.0, 0.0

    def __call__(self) -> float:
        return self.factor

    def on_step(self, run: Run) -> None:
        if run.state.step % _EVERY == 0:
            ratio = float(run.metrics["l0"].item()) / self.target  # type: ignore[arg-type]
            error = math.log(min(4.0, max(0.25, ratio)))
            self._integral += self.gain * error
            self.factor = math.exp(self._integral + self.damping * error)

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor, "integral": self._integral}

    def restore(self, state: dict[str, Any]) -> None:
        self.factor, self._integral = state["factor"], state["integral"]
