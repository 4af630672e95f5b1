"""The door for those who bring everything themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlxsae.data import ActivationSource, ArraySource
from mlxsae.sae import SAE
from mlxsae.train.callbacks import at_least_1
from mlxsae.train.config import DataConfig, LossConfig, OptimizerConfig, SAEConfig, TrainConfig
from mlxsae.train.doors import Again, _language_model, _Task, arrays_of
from mlxsae.train.loop import FitResult, fit


class ProfiSAETrainer:
    """Own module, loss, optimiser, schedule, preprocessing and callbacks; the loop is :func:`~mlxsae.train.fit`.

    ``model``, ``layer`` and ``component`` are for a ``dataset`` of texts. A dataset once given serves later calls that
    name none.
    """

    def __init__(
        self,
        model: Any = None,
        layer: int | None = None,
        component: str = "mlp",
        dataset: Any = None,
    ):
        self.model, self.layer, self.component, self.dataset = model, layer, component, dataset

    def train(
        self,
        sae: Any,
        loss_fn: Callable[..., Any] | None = None,
        optimizer: optim.Optimizer | None = None,
        dataset: Any = None,
        preprocess_fn: Callable[[mx.array], mx.array] | None = None,
        callbacks: Iterable[Any] = (),
        num_steps: int = 10_000,
        batch_size: int = 1024,
        gradient_accumulation_steps: int = 1,
        mixed_precision: bool = False,
        gradient_checkpointing: bool = False,
        validation_dataset: Any = None,
        validate_every: int = 1000,
        log_every: int = 100,
        profile: bool = False,
        seed: int = 0,
        *,
        max_grad_norm: float | None = None,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every: int = 1000,
        resume: bool = False,
        progress: bool = False,
    ) -> FitResult:
        """Train ``sae`` in place.

        Parameters
        ----------
        sae : any ``nn.Module`` that returns ``(x_recon, z)``, or an SAE of ours, which without ``preprocess_fn`` is
            trained on activations of norm ``sqrt(d_in)`` and comes out for raw ones.
        loss_fn : ``(x, x_recon, z, step) -> total`` or ``(total, {name: value})``; ``x`` is what the module got (of a
            pair, the target), ``z [n, d_sae]`` dense, ``step`` an int from 0. By default the squared error, for an SAE of
            ours the loss of ``TrainConfig``.
        optimizer : any of MLX's, its rate a number or a function of the step; by default Adam at our rate.
        dataset : an array ``[n, d]``, a pair ``(x, y)`` of them, an ``ActivationDataset``, an
            :class:`~mlxsae.data.ActivationSource`, batches, or texts.
        preprocess_fn : applied to each batch, to validation too. Noise from ``mx.random`` is repeatable.
        callbacks : of ours, or any object with ``on_batch_end(step, loss, metrics)`` and the like.
        num_steps : optimiser steps, each over ``batch_size * gradient_accumulation_steps`` rows.
        gradient_accumulation_steps : parts of a step's batch, of which one is in work at a time.
        mixed_precision : compute in bfloat16, over float32 weights.
        gradient_checkpointing : compute activations of each layer twice instead of keeping them.
        validation_dataset : like ``dataset``, but finite and walked again every ``validate_every`` steps.
        profile : account for the time in ``result.profile``.
        seed : of the order of the data and of all that ``mx.random`` gives within steps.
        checkpoint_dir, checkpoint_every, resume, progress : see :func:`~mlxsae.train.fit`.
        """
        dataset = self.dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("[ProfiSAETrainer] dataset must be given but is None.")
        self.dataset = dataset
        parts = gradient_accumulation_steps
        at_least_1(
            "ProfiSAETrainer", num_steps=num_steps, batch_size=batch_size, gradient_accumulation_steps=parts
        )
        if preprocess_fn is not None and not callable(preprocess_fn):
            raise ValueError(
                f"[ProfiSAETrainer] preprocess_fn must be a function but got {type(preprocess_fn).__name__}."
            )
        ours = isinstance(sae, SAE)
        raw = ours and preprocess_fn is None
        config = TrainConfig(
            total_tokens=num_steps * batch_size * parts,
            batch_size=batch_size,
            seed=seed,
            normalize="expected_norm" if raw else "none",
            b_dec_init="geometric_median" if ours else "keep",
            gradient_accumulation_steps=parts,
            mixed_precision=mixed_precision,
            gradient_checkpointing=gradient_checkpointing,
            log_every=log_every,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            optimizer=OptimizerConfig(max_grad_norm=max_grad_norm),
            loss=LossConfig(),
        )
        return fit(
            sae,
            self._source(dataset, config),
            config,
            loss=loss_fn,
            optimizer=optimizer,
            preprocess=preprocess_fn,
            validation=None if validation_dataset is None else self._held_out(validation_dataset, config),
            callbacks=callbacks,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            progress=progress,
            profile=profile,
        )

    def _source(self, dataset: Any, config: TrainConfig) -> Any:
        if arrays := arrays_of(dataset):
            return ArraySource(*arrays, batch_size=config.batch_size, seed=config.seed)
        if isinstance(dataset, ActivationSource):
            return dataset
        if hasattr(dataset, "source"):
            return dataset.source(config.batch_size, seed=config.seed)
        if _texts(dataset):
            return self._task(dataset, config).data(None)[1]
        return dataset

    def _held_out(self, dataset: Any, config: TrainConfig) -> Any:
        if hasattr(dataset, "batches"):
            return Again(lambda: dataset.batches(config.batch_size, shuffle=False))
        if _texts(dataset):
            return self._task(dataset, config).all_rows()
        return dataset

    def _task(self, dataset: Any, config: TrainConfig) -> _Task:
        if self.model is None or self.layer is None:
            raise ValueError("[ProfiSAETrainer] model and layer must be given for a dataset of texts.")
        lm = _language_model(self.model)
        point = lm.hook_point(self.component, layer=self.layer)
        whole = SAEConfig(train=config, data=DataConfig(validation_split=0.0))
        return _Task([lm], [point], whole, dataset, None)


def _texts(dataset: Any) -> bool:
    return isinstance(dataset, (str, os.PathLike)) or (
        isinstance(dataset, (list, tuple)) and bool(dataset) and isinstance(dataset[0], (str, dict))
    )
