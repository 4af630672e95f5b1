"""Loss terms, one function or small object each, and their weighted sum."""

from __future__ import annotations

from mlxsae.loss.auxk import AUXK_PRESETS, AuxK
from mlxsae.loss.compose import Context, Forward, Loss, Term
from mlxsae.loss.end_to_end import END_TO_END, KL, CrossEntropy
from mlxsae.loss.matryoshka import FixedPrefixes, Prefixes, RandomPrefixes
from mlxsae.loss.names import DEFAULT_TERMS, TERMS
from mlxsae.loss.reconstruction import RECONSTRUCTION, RowTerm, fvu, mse, nmse
from mlxsae.loss.revival import GhostGradients, MultiTopK, PreActs
from mlxsae.loss.sparsity import (
    L0,
    L1,
    GateL1,
    GateMean,
    GateReconstruction,
    L0Quadratic,
    L0Target,
    Lp,
    Tanh,
    anneal,
)

__all__ = [
    "AUXK_PRESETS",
    "DEFAULT_TERMS",
    "END_TO_END",
    "KL",
    "L0",
    "L1",
    "RECONSTRUCTION",
    "TERMS",
    "AuxK",
    "Context",
    "CrossEntropy",
    "FixedPrefixes",
    "Forward",
    "GateL1",
    "GateMean",
    "GateReconstruction",
    "GhostGradients",
    "L0Quadratic",
    "L0Target",
    "Loss",
    "Lp",
    "MultiTopK",
    "PreActs",
    "Prefixes",
    "RandomPrefixes",
    "RowTerm",
    "Tanh",
    "Term",
    "anneal",
    "fvu",
    "mse",
    "nmse",
]
