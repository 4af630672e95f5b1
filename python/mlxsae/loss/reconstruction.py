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
    """``sum (r - mean_n(r))^2`` over the batch ``[n, d]``: ``n d`` times the variance, as a scalar; 0 where all rows are equal.
    Passes of all threads: the mean is a product, and what each row lacks is the residual of a code that has the mean alone.
    It is taken of what rows differ by from the first: of rows far from 0 it would be off by its rounding.
    """
    rows, n = rows.astype(mx.float32), rows.shape[0]
    if n == 0:
        return mx.array(0.0)
    code = SparseCode(mx.ones((n, 1)), mx.zeros((n, 1), mx.uint32))
    apart = ops.decode_residual(code, rows[:1], rows)[0]
    mean = mx.full((1, n), 1 / n) @ apart
    return ops.decode_residual(code, mean, apart)[1].sum()
