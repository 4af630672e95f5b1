"""Loss terms, one function each, and their weighted sum."""

from __future__ import annotations

from mlxsae.loss.auxk import AUXK_PRESETS, AuxK
from mlxsae.loss.compose import Forward, Loss, Term
from mlxsae.loss.matryoshka import FixedPrefixes, Prefixes, RandomPrefixes
from mlxsae.loss.reconstruction import RECONSTRUCTION, RowTerm, fvu, mse, nmse
from mlxsae.loss.sparsity import DEFAULT_TERMS, TERMS, L0Target

__all__ = [
    "AUXK_PRESETS",
    "DEFAULT_TERMS",
    "RECONSTRUCTION",
    "TERMS",
    "AuxK",
    "FixedPrefixes",
    "Forward",
    "L0Target",
    "Loss",
    "Prefixes",
    "RandomPrefixes",
    "RowTerm",
    "Term",
    "fvu",
    "mse",
    "nmse",
]
