"""What may watch a run: subclass :class:`Callback`, override what is needed; or any class with ``on_batch_end`` and
the like."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mlxsae.train.loop import Run


class Callback:
    """Called between steps, when the state is whole: an exception here, ``KeyboardInterrupt`` included, ends
    the run in order. ``run.state`` may hold work in flight; reading an array waits for it. ``run.stop(reason)`` ends
    the run.
    """

    def on_begin(self, run: Run) -> None:
        """Before the first step, also of a resumed run."""

    def on_step(self, run: Run) -> None:
        """After each step; ``run.metrics`` are its metrics, unread."""

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        """Every ``log_every`` steps, with the metrics of that step."""

    def on_validation(self, run: Run, record: dict[str, Any]) -> None:
        """Every ``validate_every`` steps, with metrics on held-out data: ``val_loss`` and so on."""

    def on_epoch(self, run: Run, epoch: int) -> None:
        """After pass ``epoch``, from 1, over data that know their length; of other data at their end."""

    def on_end(self, run: Run) -> None:
        """After the last step, or when the run ends early for whatever reason."""

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON can hold it."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""

    def of(self, name: str) -> Callback:
        """The callback for the run ``name`` of several that are begun together: a copy, where it knows things of one run."""
        return self

    @property
    def kind(self) -> str:
        """Under which name a checkpoint keeps the state."""
        return type(self).__name__


class PlainCallback(Callback):
    """A class of somebody who knows nothing of :class:`Callback`: whichever it has of ``on_train_begin()``,
    ``on_batch_end(step, loss, metrics)``, ``on_epoch_end(epoch, metrics)``, ``on_validation_end(step, metrics)``,
    ``on_train_end()`` is called.

    ``step`` counts from 1. ``loss`` and the values of a batch's ``metrics`` are MLX scalars that nobody has read:
    comparing, formatting or ``float`` waits for the step, passing them on does not.
    """

    EVENTS = ("on_train_begin", "on_batch_end", "on_epoch_end", "on_validation_end", "on_train_end")

    def __init__(self, inner: Any):
        self.inner = inner

    @property
    def kind(self) -> str:
        return type(self.inner).__name__

    def on_begin(self, run: Run) -> None:
        self._call("on_train_begin")

    def on_step(self, run: Run) -> None:
        self._call("on_batch_end", run.state.step, run.metrics["loss"], run.metrics)

    def on_validation(self, run: Run, record: dict[str, Any]) -> None:
        self._call("on_validation_end", run.state.step, record)

    def on_epoch(self, run: Run, epoch: int) -> None:
        latest = {name: value.item() for name, value in run.metrics.items()}
        self._call("on_epoch_end", epoch, latest | (run.validations[-1] if run.validations else {}))

    def on_end(self, run: Run) -> None:
        self._call("on_train_end")

    def state(self) -> dict[str, Any]:
        # Whatever else is called so is no business of ours.
        both = all(callable(getattr(self.inner, name, None)) for name in ("state", "restore"))
        return self.inner.state() if both else {}

    def restore(self, state: dict[str, Any]) -> None:
        self.inner.restore(state)

    def _call(self, event: str, *arguments: Any) -> None:
        if hasattr(self.inner, event):
            getattr(self.inner, event)(*arguments)


def as_callback(watcher: Any) -> Callback:
    """``watcher`` itself if it is a :class:`Callback`, otherwise wrapped."""
    if isinstance(watcher, Callback):
        return watcher
    if inspect.isclass(watcher):
        raise TypeError(f"[fit] a callback must be an object but got the class {watcher.__name__}.")
    if not any(hasattr(watcher, event) for event in PlainCallback.EVENTS):
        raise TypeError(
            f"[fit] a callback must have one of {list(PlainCallback.EVENTS)} but {type(watcher).__name__} has none."
        )
    return PlainCallback(watcher)


def at_least_1(owner: str, **numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"[{owner}] {name} must be at least 1, an int, but got {value!r}.")


def listed(callbacks: Any) -> list[Any]:
    """``callbacks`` as a list; None is none."""
    if callbacks is not None and not isinstance(callbacks, Iterable):
        raise TypeError(f"[fit] callbacks must be a list of objects but got {type(callbacks).__name__}.")
    return list(callbacks or ())


class ProgressBar(Callback):
    """One line on ``stream`` (default stderr), redrawn at each log; plain lines where it is no terminal.

    Its rate is that since the run began: activations of a language model come in bursts.
    """

    def __init__(self, stream: TextIO | None = None, width: int = 24):
        self._stream = stream or sys.stderr
        self._width = width
        self._live = self._stream.isatty()
        self._begun = (0.0, 0)

    def on_begin(self, run: Run) -> None:
        self._begun = (time.perf_counter(), run.state.step)

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        done = record["step"] / run.config.total_steps
        bar = "█" * int(done * self._width)
        begun, before = self._begun
        steps_per_s = max(record["step"] - before, 1) / max(time.perf_counter() - begun, 1e-9)
        left = (run.config.total_steps - record["step"]) / steps_per_s
        line = (
            f"{bar:<{self._width}} {done:4.0%}  {record['tokens'] / 1e6:.2f}M tokens  "
            f"loss {record['loss']:.4f}  "
            f"l0 {record['l0']:.1f}  dead {record['dead_fraction']:.2%}  "
            f"{steps_per_s * run.config.rows_per_step / 1e3:.1f}k tok/s  {left:.0f} s left"
        )
        self._stream.write(f"\r\x1b[2K{line}" if self._live else line + "\n")
        self._stream.flush()

    def on_end(self, run: Run) -> None:
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
