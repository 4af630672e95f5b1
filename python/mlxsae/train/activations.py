"""The shortest way from an array of activations to an SAE."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from mlxsae.data import ArraySource
from mlxsae.io import native
from mlxsae.lm import HookPoint
from mlxsae.train.callbacks import listed
from mlxsae.train.config import SAEConfig, overruled
from mlxsae.train.doors import SAETrainer, of_kind, rows_kept, tracking_callbacks, writable
from mlxsae.train.loop import FitResult, fit


def train_sae_from_activations(
    activations: mx.array | np.ndarray,
    config: SAEConfig | None = None,
    *,
    device: str | None = None,
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
    :func:`~mlxsae.train.fit`. Without ``validation`` the last rows are held out for it, the share
    ``config.data.validation_split``. ``device`` is ``cpu`` or ``gpu`` in place of MLX's default. With ``save_dir`` the SAE is
    saved there; ``hook_point`` tells its files where the activations are from. The result's ``sae`` takes raw activations, and
    ``sae, result = ...`` works too.
    """
    config = overruled(SAETrainer(of_kind(SAEConfig, config)).config, options)
    shape = getattr(activations, "shape", type(activations).__name__)
    if not isinstance(activations, (mx.array, np.ndarray)) or activations.ndim != 2:
        raise ValueError(
            f"[train_sae_from_activations] activations must have shape [n, d_in] but got {shape}."
        )
    if config.data.validation_split and validation is None:
        m, end = rows_kept(len(activations), config.data)
        activations, validation = activations[:m], activations[m:end]
    elif config.data.validation_split:
        raise ValueError(
            "[train_sae_from_activations] validation_split must be 0 where validation is given but is "
            f"{config.data.validation_split}."
        )
    source = ArraySource(activations, batch_size=config.train.batch_size, seed=config.train.seed)
    sae = config.build(activations.shape[1])
    if config.data.hook_point is not None:
        sae.metadata = sae.metadata | {"hook_name": str(HookPoint.parse(config.data.hook_point))}
    if save_dir is not None:
        writable(save_dir, "save_dir")
    with _on(device):
        result = fit(
            sae,
            source,
            config.train,
            validation=validation,
            callbacks=[*listed(callbacks), *tracking_callbacks(config.tracking)],
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            progress=progress,
            profile=profile,
        )
    if save_dir is not None:
        native.save(result.sae, save_dir)
    return result


def _on(device: str | None) -> contextlib.AbstractContextManager[Any]:
    if device is None:
        return contextlib.nullcontext()
    kinds = {"cpu": mx.cpu} | dict.fromkeys(("gpu", "cuda", "metal", "mps"), mx.gpu)
    there = sorted(name for name, kind in kinds.items() if mx.is_available(kind))
    if device not in there:
        raise ValueError(
            f"[train_sae_from_activations] device must be one of {there} here but got {device!r}."
        )
    return mx.stream(kinds[device])
