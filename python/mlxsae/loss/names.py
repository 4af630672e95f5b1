"""The terms that configurations name."""

from __future__ import annotations

from mlxsae.loss import revival, sparsity
from mlxsae.loss.compose import Term

TERMS: dict[str, Term] = {
    "l1": sparsity.L1(),
    "lp": sparsity.Lp(0.5),
    "tanh": sparsity.Tanh(),
    "l0": sparsity.L0(),
    "l0_target": sparsity.L0Target(),
    "l0_quadratic": sparsity.L0Quadratic(),
    "gate_l1": sparsity.GateL1(),
    "gate_reconstruction": sparsity.GateReconstruction(relative=True),
    "gate_mean": sparsity.GateMean(),
    "pre_acts": revival.PreActs(),
    "ghost_gradients": revival.GhostGradients(),
    "multi_topk": revival.MultiTopK(),
}
"""Each with its usual numbers; for others build a :class:`~mlxsae.loss.Loss`."""

DEFAULT_TERMS: dict[str, dict[str, float]] = {
    "jumprelu": {"l0_target": 1.0},
    "relu": {"l1": 1e-2},
    "gated": {"gate_l1": 1e-2, "gate_reconstruction": 1.0},
    "sigmoid_gated": {"gate_mean": 1e-3},
    "topk_jumprelu": {"tanh": 1e-4},
}
"""By architecture, the weights of the terms that its rule cannot do without."""
