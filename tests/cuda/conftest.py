"""Puts the build's tools, the harness and this folder on the path."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(p) for p in (HERE, HERE.parent / "metal", HERE.parents[1] / "cmake")]
