"""What a trainer and an evaluator both measure: sparsity, reconstruction, dead latents, loss recovered,
speed.

The functions return MLX scalars and never synchronise; the accumulators stream over any number of batches,
keep float64 sums on the host and synchronise once per batch.
"""

from __future__ import annotations

from mlxsae.metrics.functions import (
    ce_loss_recovered,
    dead_fraction,
    explained_variance,
    fire_counts,
    fire_rate,
    fvu,
    l0,
    nmse,
)
from mlxsae.metrics.streaming import (
    Evaluation,
    FireCounter,
    LossRecovered,
    Reconstruction,
    Throughput,
    evaluate,
)

__all__ = [
    "Evaluation",
    "FireCounter",
    "LossRecovered",
    "Reconstruction",
    "Throughput",
    "ce_loss_recovered",
    "dead_fraction",
    "evaluate",
    "explained_variance",
    "fire_counts",
    "fire_rate",
    "fvu",
    "l0",
    "nmse",
]
