"""Named compositions: what the common architectures put together."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxsae.sae.hierarchical import Hierarchical, HierarchicalSAE
from mlxsae.sae.model import SAE
from mlxsae.sae.rule import Rule


def sae(
    d_in: int, *, k: int, expansion_factor: int = 16, dtype: mx.Dtype = mx.float32, seed: int | None = None
) -> SAE:
    """A TopK sparse autoencoder with ``d_sae = expansion_factor * d_in`` latents."""
    return SAE(d_in, expansion_factor * d_in, k=k, dtype=dtype, seed=seed)


def transcoder(
    d_in: int,
    d_out: int,
    *,
    k: int,
    expansion_factor: int = 16,
    dtype: mx.Dtype = mx.float32,
    seed: int | None = None,
) -> SAE:
    """A TopK transcoder: reads one activation ``[n, d_in]``, predicts another ``[n, d_out]``.

    ``d_sae = expansion_factor * d_in``; ``b_dec`` belongs to the target and is not subtracted from the input.
    """
    return SAE(d_in, expansion_factor * d_in, k=k, d_out=d_out, dtype=dtype, seed=seed)


def of_rule(d_in: int, d_sae: int, *, rule: Rule, **options: Any) -> SAE:
    """The SAE of ``d_sae`` latents that ``rule`` is for: a :class:`HierarchicalSAE` for :class:`Hierarchical`, else a plain
    one. ``options`` are those of its constructor: ``tied``, ``dtype``, ``seed``.
    """
    if isinstance(rule, Hierarchical):
        return HierarchicalSAE.with_rule(d_in, d_sae, rule=rule, **options)
    return SAE(d_in, d_sae, rule=rule, **options)
