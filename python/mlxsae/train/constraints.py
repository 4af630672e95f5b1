"""The unit-norm constraint on decoder rows."""

from __future__ import annotations

import mlx.core as mx


def unit_rows(weight: mx.array) -> mx.array:
    """Rows of ``weight [d_sae, d]`` divided by their norm; a zero row stays zero."""
    norm = mx.linalg.norm(weight, axis=-1, keepdims=True)
    return weight / mx.where(norm == 0, mx.ones_like(norm), norm)


def without_parallel(gradient: mx.array, weight: mx.array) -> mx.array:
    """``gradient`` less its component along each unit row of ``weight``: that part would only change the
    norm, which the constraint takes back, but would enter Adam's moments.
    """
    return gradient - (gradient * weight).sum(axis=-1, keepdims=True) * weight
