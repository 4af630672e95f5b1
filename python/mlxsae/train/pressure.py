"""The weight of a sparsity penalty that brings L0 where it is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxsae.train.callbacks import Callback

if TYPE_CHECKING:
    from mlxsae.train.loop import Run

_EVERY = 10  # steps: as often as the trainer looks at the device anyway


class SparsityController(Callback):
    r"""Every ten steps, ``factor`` becomes :math:`factor \cdot (L_0 / target)^{gain}`, with the L0 of the batch: it rises while
    too many latents fire, falls while too few do, and rests where the mean of log L0 is that of the target.

    L0 answers a weight with a delay of some hundred steps; a ``gain`` much over the default's makes both swing. A step
    changes the factor by at most ``20 ** gain``.
    """

    def __init__(self, target: float, gain: float = 0.05):
        if not (target > 0 and gain > 0):
            raise ValueError(
                f"[SparsityController] target and gain must be positive but got {target} and {gain}."
            )
        self.target, self.gain, self.factor = target, gain, 1.0

    def __call__(self) -> float:
        return self.factor

    def on_step(self, run: Run) -> None:
        if run.state.step % _EVERY == 0:
            ratio = float(run.metrics["l0"].item()) / self.target  # type: ignore[arg-type]
            self.factor *= min(20.0, max(0.05, ratio)) ** self.gain

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def restore(self, state: dict[str, Any]) -> None:
        self.factor = state["factor"]
