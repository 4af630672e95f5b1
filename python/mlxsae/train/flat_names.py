"""Flat spellings of configuration, as other tools and older plans use them: the one place that knows them.

``SAEConfig(learning_rate=3e-4, num_epochs=5, use_wandb=True)`` is ``SAEConfig(train=TrainConfig(epochs=5,
optimizer=OptimizerConfig(learning_rate=3e-4)), tracking=TrackingConfig(wandb=True))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_PATHS: dict[str, str] = {
    "d_hidden": "d_sae",
    "sae_type": "architecture",
    "activation": "architecture",
    "tied_weights": "tied",
    "component_weights": "source_weights",
    # training
    "batch_size": "train.batch_size",
    "num_epochs": "train.epochs",
    "epochs": "train.epochs",
    "num_activations": "train.total_tokens",
    "total_tokens": "train.total_tokens",
    "seed": "train.seed",
    "precision": "train.precision",
    "engine": "train.engine",
    "normalize_decoder": "train.normalize_decoder",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "mixed_precision": "train.mixed_precision",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "log_every": "train.log_every",
    "validate_every": "train.validate_every",
    "eval_every": "train.validate_every",
    "checkpoint_every": "train.checkpoint_every",
    "save_every": "train.checkpoint_every",
    # optimiser
    "learning_rate": "train.optimizer.learning_rate",
    "lr": "train.optimizer.learning_rate",
    "optimizer": "train.optimizer.name",
    "warmup_steps": "train.optimizer.warmup",
    "lr_decay_steps": "train.optimizer.decay",
    "gradient_clip": "train.optimizer.max_grad_norm",
    "moments": "train.optimizer.moments",
    # loss
    "dead_feature_window": "train.loss.dead_after",
    "feature_sampling_window": "train.loss.dead_after",
    "auxk": "train.loss.auxk",
    "k_aux": "train.loss.k_aux",
    "end_to_end": "train.loss.end_to_end",
    "target_l0": "train.loss.target_l0",
    "p_end": "train.loss.p_end",
    "prefixes": "train.loss.prefixes",
    "random_prefixes": "train.loss.random_prefixes",
    "wake": "train.wake",
    "k_start": "train.k_start",
    "decoder_init": "train.decoder_init",
    "resample_dead_every": "train.resample_every",
    "resample_interval": "train.resample_every",
    # data
    "hook_point": "data.hook_point",
    "validation_split": "data.validation_split",
    "context_size": "data.context_size",
    "text_batch_size": "data.lm_batch_size",
    "lm_batch_size": "data.lm_batch_size",
    "buffer_tokens": "data.buffer_tokens",
    # tracking
    "use_wandb": "tracking.wandb",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "wandb_name": "tracking.name",
    "wandb_tags": "tracking.tags",
}


_STEPS = ("warmup_steps", "lr_decay_steps", "sparsity_warm_up_steps")
"""Spans in steps, or fractions of the run."""


def _scheduler(value: str) -> dict[str, Any]:
    # Other tools decay over all that follows the warm-up.
    return {"train.optimizer.shape": value} | ({} if value == "constant" else {"train.optimizer.decay": 0.95})


def _window(value: float) -> dict[str, Any]:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"[config] dead_neuron_threshold must be a share in [0, 1) but got {value!r}.")
    # One that fires less often than f of the time has, as a rule, been silent for 1 / f tokens.
    return {"train.loss.dead_after": round(1 / value)} if value else {}


_SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lr_scheduler": _scheduler,
    "normalize_input": lambda value: {"train.normalize": _normalize(value)},
    "normalize_activations": lambda value: {"train.normalize": _normalize(value)},
    # AuxK is what does the work of ghost gradients for TopK rules (Gao et al. 2024); of others the configuration sees to
    # it, which knows the architecture.
    "use_ghost_grads": lambda value: {} if value else {"train.loss.auxk": None},
    "lambda_sparse": lambda value: {"train.loss.terms": {"l1": value}} if value else {},
    "l1_coefficient": lambda value: {"train.loss.terms": {"l1": value}} if value else {},
    "dead_neuron_threshold": lambda value: _window(value),
    "dead_latent_threshold": lambda value: _window(value),
    "sparsity_warm_up_steps": lambda value: (
        {} if value is None else {"train.loss.warmup": value, "train.k_warmup": value}
    ),
}
FLAT_NAMES = (*_PATHS, *_SPECIAL)


def _normalize(value: Any) -> Any:
    return ("expected_norm" if value else "none") if isinstance(value, bool) else value


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """``{"learning_rate": 1e-3}`` as ``{"train": {"optimizer": {"learning_rate": 1e-3}}}``; a value None is left out.

    ``ValueError`` for a name that is none of :data:`FLAT_NAMES`.
    """
    if unknown := sorted(options.keys() - set(FLAT_NAMES)):
        raise ValueError(
            f"[config] keys must be known but got {', '.join(unknown)}; known are {sorted(FLAT_NAMES)}."
        )
    tree: dict[str, Any] = {}
    # General ones first: lr_decay_steps overrules what lr_scheduler implies.
    for name in sorted(options, key=lambda n: n not in _SPECIAL):
        value = options[name]
        if value is None:
            continue
        if name in _STEPS and type(value) is int and value == 1:
            value = math.nextafter(1, 2)  # one step; 1 would be the whole run
        for path, v in (_SPECIAL[name](value) if name in _SPECIAL else {_PATHS[name]: value}).items():
            *parents, last = path.split(".")
            level = tree
            for parent in parents:
                level = level.setdefault(parent, {})
            level[last] = v
    return tree


# The defaults that the plans state, under their names. Width and rate of the SAE's are the later ones (32, 3e-4), which
# replace 16 and 1e-4. Our own defaults differ where measurements say so: the learning rate follows d_sae, a step takes
# 1,024 tokens.
DEFAULT_SAE_CONFIG: dict[str, Any] = {
    "expansion_factor": 32,
    "k": 100,
    "learning_rate": 3e-4,
    "batch_size": 256,
    "num_epochs": 10,
    "lambda_sparse": 0.0,
    "normalize_input": True,
    "tied_weights": False,
    "dead_neuron_threshold": 1e-6,
    "warmup_steps": 1000,
    "gradient_clip": 1.0,
    "checkpoint_every": 5000,
    "validation_split": 0.05,
}
DEFAULT_TRANSCODER_CONFIG = DEFAULT_SAE_CONFIG | {
    "expansion_factor": 8,
    "k": 50,
    "learning_rate": 5e-5,
    "num_epochs": 15,
}
DEFAULT_CROSSCODER_CONFIG = DEFAULT_SAE_CONFIG | {
    "expansion_factor": 24,
    "k": 150,
    "learning_rate": 1e-4,
    "batch_size": 128,
    "num_epochs": 12,
    "component_weights": None,
}
