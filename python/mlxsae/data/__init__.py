"""Activation sources: streams of shuffled batches whose position can be saved and restored."""

from __future__ import annotations

from mlxsae.data.source import ActivationSource, ArraySource, Chunk, IterableSource, ShuffleBuffer, as_source

__all__ = ["ActivationSource", "ArraySource", "Chunk", "IterableSource", "ShuffleBuffer", "as_source"]
