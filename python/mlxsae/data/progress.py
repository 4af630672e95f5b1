"""A line of progress on stderr, for work that the caller asked to watch."""

from __future__ import annotations

import sys
import time
from typing import Self, TextIO

_EVERY, _WIDTH = 0.2, 24


class Progress:
    """``with Progress(total, unit="tokens") as bar: bar.show(done)``: a bar that is redrawn on a terminal, a line
    every ten seconds elsewhere, nothing unless ``enabled``. ``total`` may be unknown.
    """

    def __init__(
        self, total: int | None, *, unit: str, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._total, self._unit, self._enabled = total, unit, enabled
        self._stream = stream or sys.stderr
        self._live = enabled and self._stream.isatty()
        self._every = _EVERY if self._live else 10.0
        self._begun: tuple[float, int] | None = None
        self._shown = -self._every
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled and self._begun is not None:
            self._draw(time.perf_counter())
            if self._live:
                self._stream.write("\n")
            self._stream.flush()

    def show(self, done: int) -> None:
        """So much is done, in all; what the first call says was done before."""
        now = time.perf_counter()
        self._done = done
        if self._begun is None:
            self._begun, self._shown = (now, done), now
        elif self._enabled and now - self._shown >= self._every:
            self._shown = now
            self._draw(now)
            self._stream.flush()

    def _draw(self, now: float) -> None:
        assert self._begun is not None
        begun, before = self._begun
        rate = (self._done - before) / max(now - begun, 1e-9)
        line = f"{self._done:,} {self._unit}  {rate:,.0f} {self._unit}/s"
        if self._total:
            share = min(self._done / self._total, 1.0)
            left = max(self._total - self._done, 0) / rate if rate > 0 else 0.0
            line = f"{'█' * int(share * _WIDTH):<{_WIDTH}} {share:4.0%}  {line}  {left:,.0f} s left"
        self._stream.write(f"\r\x1b[2K{line}" if self._live else line + "\n")
