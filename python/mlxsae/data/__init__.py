"""Activation sources: streams of shuffled batches whose position can be saved and restored, and datasets on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlxsae.data.dataset import ActivationDataset, DatasetSource
from mlxsae.data.source import ActivationSource, ArraySource, Chunk, IterableSource, ShuffleBuffer, as_source
from mlxsae.data.statistics import Statistics

if TYPE_CHECKING:
    from mlxsae.data.collector import (
        ActivationCollector,
        collect_activations,
        collect_activations_from_dataloader,
    )
    from mlxsae.data.curation import prepare_dataset
    from mlxsae.data.model_activations import ContextActivations, ModelActivations

__all__ = [
    "ActivationCollector",
    "ActivationDataset",
    "ActivationSource",
    "ArraySource",
    "Chunk",
    "ContextActivations",
    "DatasetSource",
    "IterableSource",
    "ModelActivations",
    "ShuffleBuffer",
    "Statistics",
    "as_source",
    "collect_activations",
    "collect_activations_from_dataloader",
    "prepare_dataset",
]

# These import the language-model room, and whoever brings their own activations has no need of it.
_LATER = {
    "ActivationCollector": "collector",
    "ContextActivations": "model_activations",
    "ModelActivations": "model_activations",
    "collect_activations": "collector",
    "collect_activations_from_dataloader": "collector",
    "prepare_dataset": "curation",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
