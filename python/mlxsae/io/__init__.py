"""Files: SAELens' layout as the native one, atomic writes, strict reads. Nothing is ever unpickled."""

from __future__ import annotations

from mlxsae.io.collection import SAEs, load_saes
from mlxsae.io.native import load, save

__all__ = ["SAEs", "load", "load_saes", "save"]
