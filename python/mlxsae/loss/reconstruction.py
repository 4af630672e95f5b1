"""Reconstruction terms: functions of target ``y`` and reconstruction ``y_hat [n, d]`` alone.

Being that, they give the fused engine its gradient ``dL/dy_hat`` without a graph through the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


def mse(y: mx.array, y_hat: mx.array) -> mx.array:
    """Squared error summed over coordinates, averaged over tokens: ``mean_n sum_d (y - y_hat)^2``
    (SAELens, dictionary_learning)."""
    return mx.square(y - y_hat).sum(axis=-1).mean()


def fvu(y: mx.array, y_hat: mx.array) -> mx.array:
    """``sum (y - y_hat)^2 / sum (y - mean_n(y))^2`` over the batch (sparsify): free of scale, 1 for
    predicting the mean.
    """
    return mx.square(y - y_hat).sum() / nonzero(mx.square(y - y.mean(axis=0)).sum())


def nmse(y: mx.array, y_hat: mx.array) -> mx.array:
    """Mean over tokens of ``|y - y_hat|^2 / |y|^2`` (OpenAI): tokens of small norm weigh as much as large
    ones.
    """
    return (mx.square(y - y_hat).sum(axis=-1) / nonzero(mx.square(y).sum(axis=-1))).mean()


RECONSTRUCTION: dict[str, Callable[[mx.array, mx.array], mx.array]] = {"mse": mse, "fvu": fvu, "nmse": nmse}


def nonzero(denominator: mx.array) -> mx.array:
    """1 in place of 0, so that a batch without variance has a finite loss; NaN stays NaN."""
    return mx.where(denominator == 0, mx.ones_like(denominator), denominator)
