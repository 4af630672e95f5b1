"""Reconstruction terms: functions of each token's squared error and of the target.

Written so, one fused op (:func:`mlxsae.ops.decode_residual`) gives all they need, and their gradient at the
reconstruction is the residual times one number a token.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxsae import ops
from mlxsae.code import SparseCode

RowTerm = Callable[[mx.array, mx.array], mx.array]
"""From squared errors ``s [n]``, summed over coordinates, and target ``y [n, d_out]`` to a scalar."""


def mse(s: mx.array, y: mx.array) -> mx.array:
    """Squared error summed over coordinates, averaged over tokens: ``mean_n sum_d (y - y_hat)^2``
    (SAELens, dictionary_learning)."""
    return s.mean()


def fvu(s: mx.array, y: mx.array) -> mx.array:
    """``sum (y - y_hat)^2 / sum (y - mean_n(y))^2`` over the batch (sparsify): free of scale, 1 where the
    mean is predicted."""
    return s.sum() / nonzero(sum_about_mean(y))


def nmse(s: mx.array, y: mx.array) -> mx.array:
    """Mean over tokens of ``|y - y_hat|^2 / |y|^2`` (OpenAI): small tokens weigh as much as large ones."""
    return (s / nonzero(squared_norms(y))).mean()


RECONSTRUCTION: dict[str, RowTerm] = {"mse": mse, "fvu": fvu, "nmse": nmse}

UNIFORM: tuple[RowTerm, ...] = (mse, fvu)
"""Terms that weigh all tokens of a batch alike: the gradient at every ``s`` is one number."""


def nonzero(denominator: mx.array) -> mx.array:
    """1 in place of 0, so that a batch without variance has a finite loss; NaN stays NaN."""
    return mx.where(denominator == 0, mx.ones_like(denominator), denominator)


def squared_norms(rows: mx.array) -> mx.array:
    """``|r_t|^2`` of ``rows [n, d]``: ``[n]``. One pass of all threads, where MLX's square and sum are two of one."""
    return ops.gather_dot(rows, rows, mx.arange(rows.shape[0], dtype=mx.uint32)[:, None])[:, 0]


def sum_about_mean(rows: mx.array) -> mx.array:
    """``sum (r - mean_n(r))^2`` over the batch ``[n, d]``: ``n d`` times the variance, as a scalar. Two passes of all
    threads: the mean is a product, and what each row lacks is the residual of a code that has the mean alone."""
    rows, n = rows.astype(mx.float32), max(rows.shape[0], 1)
    mean = mx.full((1, rows.shape[0]), 1 / n) @ rows
    code = SparseCode(mx.ones((rows.shape[0], 1)), mx.zeros((rows.shape[0], 1), mx.uint32))
    return ops.decode_residual(code, mean, rows)[1].sum()
