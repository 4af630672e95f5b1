"""Timing, as functions that return numbers."""

from __future__ import annotations

from mlxsae.bench.step import time_step

__all__ = ["time_step"]
