"""Metrics of one batch, as pure functions of arrays.

Definitions differ between systems; each docstring states the one used. A latent fires on a token where its
value is greater than 0.
"""

from __future__ import annotations

import mlx.core as mx

from mlxsae.code import Code, DenseCode, n_tokens


def l0(code: Code) -> mx.array:
    """Mean number of latents that fire per token (float32 scalar)."""
    return (code.values > 0).sum().astype(mx.float32) / n_tokens(code)


def fvu(x: mx.array, x_hat: mx.array) -> mx.array:
    """Fraction of variance unexplained, ``sum((x - x_hat)^2) / sum((x - mean(x))^2)``.

    ``x, x_hat [..., d]``: the mean is per coordinate over all tokens (every axis but the last), the sums run
    over everything. A batch without variance, all of whose tokens are equal, gives inf or NaN. For many batches use :class:`Reconstruction`:
    a mean of batch FVUs is not the FVU of the set.
    """
    x, x_hat = x.astype(mx.float32), x_hat.astype(mx.float32)
    apart = x.reshape(-1, x.shape[-1])
    apart = apart - apart[:1]  # of tokens far from 0 the mean would be off by its rounding
    return mx.square(x - x_hat).sum() / mx.square(apart - apart.mean(axis=0)).sum()


def explained_variance(x: mx.array, x_hat: mx.array) -> mx.array:
    """``1 - fvu(x, x_hat)``: SAELens' current definition, not its legacy mean of per-token ratios."""
    return 1.0 - fvu(x, x_hat)


def nmse(x: mx.array, x_hat: mx.array) -> mx.array:
    """Mean over tokens of ``sum_d((x - x_hat)^2) / sum_d(x^2)`` (OpenAI's ``normalized_mse``). Not FVU:
    nothing is centred.
    """
    x, x_hat = x.astype(mx.float32), x_hat.astype(mx.float32)
    return (mx.square(x - x_hat).sum(axis=-1) / mx.square(x).sum(axis=-1)).mean()


def fire_counts(code: Code, d_sae: int) -> mx.array:
    """Number of tokens on which each latent fires: int32 ``[d_sae]``."""
    if isinstance(code, DenseCode):
        return (code.values.reshape(-1, d_sae) > 0).astype(mx.int32).sum(axis=0)
    fired = (code.values > 0).astype(mx.int32).reshape(-1)
    return mx.zeros(d_sae, mx.int32).at[code.indices.reshape(-1)].add(fired)


def fire_rate(counts: mx.array, n_tokens: int) -> mx.array:
    """Fraction of ``n_tokens`` on which each latent fired (its density): float32 ``[d_sae]``."""
    return counts.astype(mx.float32) / n_tokens


def dead_fraction(counts: mx.array) -> mx.array:
    """Fraction of latents that never fired on the tokens of ``counts [d_sae]`` (float32 scalar)."""
    return (counts == 0).astype(mx.float32).mean()


def ce_loss_recovered(ce_clean: float, ce_sae: float, ce_ablated: float) -> float:
    """``(ce_ablated - ce_sae) / (ce_ablated - ce_clean)``: 1 where splicing the SAE in costs nothing, 0 where
    it is as bad as the ablation.

    Say which ablation: replacing the activation by zeros or by its mean over the data gives different
    numbers; the mean is the harder reference. Cross entropies in nats per token, on the same tokens.
    """
    return (ce_ablated - ce_sae) / (ce_ablated - ce_clean)
