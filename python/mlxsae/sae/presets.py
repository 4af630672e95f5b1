"""Named compositions: what the common architectures put together."""

from __future__ import annotations

import mlx.core as mx

from mlxsae.sae.model import SAE


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
