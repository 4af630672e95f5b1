"""The shortest way from an array of activations to an SAE."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlxsae.data import ArraySource
from mlxsae.train.config import SAEConfig
from mlxsae.train.loop import FitResult, fit


def train_sae_from_activations(
    activations: mx.array | np.ndarray, config: SAEConfig | None = None, **options: Any
) -> FitResult:
    """Train a new SAE on ``activations [n, d_in]`` (a memory-mapped array works), shuffled anew each epoch.

    ``options`` go to :func:`~mlxsae.train.loop`. The result's ``sae`` takes raw activations.
    """
    config = config or SAEConfig()
    if activations.ndim != 2:
        raise ValueError(
            f"[train_sae_from_activations] activations must have shape [n, d_in] but got {activations.shape}."
        )
    source = ArraySource(activations, batch_size=config.train.batch_size, seed=config.train.seed)
    return fit(config.build(activations.shape[1]), source, config.train, **options)
