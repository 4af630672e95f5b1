"""What may watch a run: subclass :class:`Callback`, override what is needed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mlxsae.train.loop import Run


class Callback:
    """Called between steps, when the state is whole: an exception here, ``KeyboardInterrupt`` included, ends
    the run in order. ``run.state`` may hold work in flight; reading an array waits for it.
    """

    def on_begin(self, run: Run) -> None:
        """Before the first step, also of a resumed run."""

    def on_step(self, run: Run) -> None:
        """After each step."""

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        """Every ``log_every`` steps, with the metrics of that step."""

    def on_end(self, run: Run) -> None:
        """After the last step, or when the run ends early for whatever reason."""


class ProgressBar(Callback):
    """One line on ``stream`` (default stderr), redrawn at each log; plain lines where it is no terminal."""

    def __init__(self, stream: TextIO | None = None, width: int = 24):
        self._stream = stream or sys.stderr
        self._width = width
        self._live = self._stream.isatty()

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        done = record["step"] / run.config.total_steps
        bar = "█" * int(done * self._width)
        left = (
            (run.config.total_steps - record["step"])
            * run.config.batch_size
            / max(record["tokens_per_s"], 1e-9)
        )
        line = (
            f"{bar:<{self._width}} {done:4.0%}  {record['tokens'] / 1e6:.2f}M tokens  "
            f"loss {record['loss']:.4f}  "
            f"l0 {record['l0']:.1f}  dead {record['dead_fraction']:.2%}  "
            f"{record['tokens_per_s'] / 1e3:.1f}k tok/s  {left:.0f} s left"
        )
        self._stream.write(f"\r\x1b[2K{line}" if self._live else line + "\n")
        self._stream.flush()

    def on_end(self, run: Run) -> None:
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
