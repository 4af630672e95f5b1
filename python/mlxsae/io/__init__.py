"""Files: SAELens' layout as the native one, atomic writes, strict reads. Nothing is ever unpickled."""

from __future__ import annotations

from mlxsae.io.native import load, save

__all__ = ["load", "save"]
