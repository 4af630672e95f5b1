"""Metrics of one batch, as pure functions of arrays.

Definitions differ between systems; each docstring states the one used. A latent fires on a token where its
value is greater than 0.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

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
    return _total(mx.square(x - x_hat)) / _total(mx.square(apart - apart.mean(axis=0)))


def _total(squares: mx.array) -> mx.array:
    """Rows first: one float32 sum over millions of numbers loses percents, for it outgrows each of them."""
    return squares.sum(axis=-1).sum()


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
    """Number of tokens on which each latent fires: int32 ``[d_sae]``. Indices that are not below ``d_sae`` count for
    nothing; :class:`FireCounter`, which waits for the counts, refuses them.

    Raises
    ------
    ValueError
        Dense latents of another width.
    """
    return fire_bins(code, d_sae)[:d_sae]


def fire_bins(code: Code, d_sae: int) -> mx.array:
    """:func:`fire_counts`, then the number of firings that are of no latent: int32 ``[d_sae + 1]``."""
    if isinstance(code, DenseCode):
        if code.values.shape[-1] != d_sae:
            raise ValueError(
                f"[fire_counts] values must have shape [..., {d_sae}] but got {code.values.shape}."
            )
        fires = (code.values > 0).astype(mx.int32)
        return mx.pad(fires.sum(axis=tuple(range(fires.ndim - 1))), (0, 1))
    fired = (code.values > 0).astype(mx.int32).reshape(-1)
    # MLX's scatter writes wherever an index says.
    return mx.zeros(d_sae + 1, mx.int32).at[mx.minimum(code.indices.reshape(-1), d_sae)].add(fired)


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
    numbers; the mean is the harder reference. Cross entropies in nats per token, on the same tokens. An ablation that
    costs nothing leaves nothing to recover: NaN, or infinite where the SAE costs something.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(ce_ablated - ce_sae, ce_ablated - ce_clean, dtype=np.float64))
