"""ONE trainer: ``fit``, its state, schedules, constraints, callbacks and checkpoints."""

from __future__ import annotations

from mlxsae.train.activations import train_sae_from_activations
from mlxsae.train.callbacks import Callback, ProgressBar
from mlxsae.train.config import (
    CrosscoderConfig,
    CrossLayerConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    SAEConfig,
    TrackingConfig,
    TrainConfig,
    TranscoderConfig,
)
from mlxsae.train.diagnosis import Finding, diagnose
from mlxsae.train.doors import (
    SAETrainer,
    train_cross_layer_transcoder,
    train_crosscoder,
    train_sae,
    train_saes,
    train_transcoder,
)
from mlxsae.train.flat_names import DEFAULT_CROSSCODER_CONFIG, DEFAULT_SAE_CONFIG, DEFAULT_TRANSCODER_CONFIG
from mlxsae.train.initial import (
    directions,
    geometric_median,
    initialize,
    initialize_decoder_from_pca,
    initialize_encoder_as_transpose,
)
from mlxsae.train.loop import FitResult, Job, NonFiniteError, Run, fit, fit_many
from mlxsae.train.optimizers import OPTIMIZERS, Signum
from mlxsae.train.profi import ProfiSAETrainer
from mlxsae.train.resampling import DeadNeuronCallback
from mlxsae.train.schedules import warmup_decay
from mlxsae.train.state import TrainState
from mlxsae.train.tracking import Experiment, TensorBoardCallback, WandbCallback
from mlxsae.train.watchers import CheckpointCallback, EarlyStoppingCallback

__all__ = [
    "DEFAULT_CROSSCODER_CONFIG",
    "DEFAULT_SAE_CONFIG",
    "DEFAULT_TRANSCODER_CONFIG",
    "OPTIMIZERS",
    "Callback",
    "CheckpointCallback",
    "CrossLayerConfig",
    "CrosscoderConfig",
    "DataConfig",
    "DeadNeuronCallback",
    "EarlyStoppingCallback",
    "Experiment",
    "Finding",
    "FitResult",
    "Job",
    "LossConfig",
    "NonFiniteError",
    "OptimizerConfig",
    "ProfiSAETrainer",
    "ProgressBar",
    "Run",
    "SAEConfig",
    "SAETrainer",
    "Signum",
    "TensorBoardCallback",
    "TrackingConfig",
    "TrainConfig",
    "TrainState",
    "TranscoderConfig",
    "WandbCallback",
    "diagnose",
    "directions",
    "fit",
    "fit_many",
    "geometric_median",
    "initialize",
    "initialize_decoder_from_pca",
    "initialize_encoder_as_transpose",
    "train_cross_layer_transcoder",
    "train_crosscoder",
    "train_sae",
    "train_sae_from_activations",
    "train_saes",
    "train_transcoder",
    "warmup_decay",
]
