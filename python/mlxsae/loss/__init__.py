"""Loss terms, one function each, and their weighted sum."""

from __future__ import annotations

from mlxsae.loss.auxk import AUXK_PRESETS, AuxK
from mlxsae.loss.compose import Forward, Loss, Term
from mlxsae.loss.reconstruction import RECONSTRUCTION, RowTerm, fvu, mse, nmse

__all__ = [
    "AUXK_PRESETS",
    "RECONSTRUCTION",
    "AuxK",
    "Forward",
    "Loss",
    "RowTerm",
    "Term",
    "fvu",
    "mse",
    "nmse",
]
