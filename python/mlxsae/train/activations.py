"""The shortest way from an array of activations to an SAE."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsae.data import ArraySource
from mlxsae.io import native
from mlxsae.train.config import SAEConfig, overruled
from mlxsae.train.doors import tracking_callbacks
from mlxsae.train.loop import FitResult, fit


def train_sae_from_activations(
    activations: mx.array | np.ndarray,
    config: SAEConfig | None = None,
    *,
    save_dir: str | os.PathLike | None = None,
    validation: Any = None,
    callbacks: Iterable[Any] = (),
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = False,
    profile: bool = False,
    **options: Any,
) -> FitResult:
    """Train a new SAE on ``activations [n, d_in]`` (a memory-mapped array works), shuffled anew each epoch.

    ``options`` are flat names of configuration (``k=64``, ``learning_rate=1e-3``) that overrule ``config``; the rest as in
    :func:`~mlxsae.train.fit`. With ``save_dir`` the SAE is saved there. The result's ``sae`` takes raw activations.
    """
    config = overruled(config or SAEConfig(), options)
    if activations.ndim != 2:
        raise ValueError(
            f"[train_sae_from_activations] activations must have shape [n, d_in] but got {activations.shape}."
        )
    source = ArraySource(activations, batch_size=config.train.batch_size, seed=config.train.seed)
    result = fit(
        config.build(activations.shape[1]),
        source,
        config.train,
        validation=validation,
        callbacks=[*callbacks, *tracking_callbacks(config.tracking)],
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        progress=progress,
        profile=profile,
    )
    if save_dir is not None:
        native.save(result.sae, save_dir)
    return result
