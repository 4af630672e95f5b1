"""What the first sample of activations decides: the scale of the data and where ``b_dec`` starts."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np


def geometric_median(x: mx.array, *, iterations: int = 100, tolerance: float = 1e-6) -> mx.array:
    """The point with the least summed Euclidean distance to the rows of ``x [n, d]``, by Weiszfeld's
    iteration.

    Outliers such as attention sinks, which drag the mean, weigh no more here than any other token. Stops when
    a step is shorter than ``tolerance`` times the mean distance. Float32 ``[d]``.
    """
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"[geometric_median] x must have shape [n, d] with n > 0 but got {x.shape}.")
    x = x.astype(mx.float32)
    median = x.mean(axis=0)
    for _ in range(iterations):
        distance = mx.linalg.norm(x - median, axis=-1)
        mean_distance = distance.mean()
        # A row on the median itself would weigh infinitely; cap it far above the rest.
        weight = 1.0 / mx.maximum(distance, 1e-6 * mean_distance + 1e-30)
        moved = (weight[:, None] * x).sum(axis=0) / weight.sum()
        done = mx.linalg.norm(moved - median) <= tolerance * mean_distance
        median = moved
        if done.item():
            break
    return median


def finite_rows(*fields: mx.array) -> tuple[mx.array, ...]:
    """Rows that are finite in every field. A bad row must not spoil the start; the step that meets it names
    its batch.
    """
    good = mx.stack([mx.isfinite(f).all(axis=-1) for f in fields]).all(axis=0)
    rows = mx.array(np.flatnonzero(np.array(good)).astype(np.uint32))
    if rows.size == 0:
        raise ValueError(
            "[fit] activations must be finite but every row of the first sample holds NaN or inf."
        )
    return tuple(f[rows] for f in fields)


def expected_norm_scale(x: mx.array) -> float:
    """``sqrt(d) / mean |x|``: the factor that brings rows of ``x [n, d]`` to norm ``sqrt(d)`` on average."""
    norm = float(mx.linalg.norm(x.astype(mx.float32), axis=-1).mean())
    if not norm > 0:
        raise ValueError(f"[fit] activations must have a positive mean norm to be scaled but got {norm}.")
    return math.sqrt(x.shape[-1]) / norm


def column_statistics(x: mx.array) -> tuple[mx.array, mx.array]:
    """Mean and standard deviation of each coordinate of ``x [n, d]``, float32 ``[d]``; a coordinate that never varies
    has deviation 1.
    """
    x = x.astype(mx.float32)
    mean = x.mean(axis=0)
    std = mx.sqrt(mx.square(x - mean).mean(axis=0))
    return mean, mx.where(std > 0, std, mx.ones_like(std))


def source_statistics(
    x: mx.array, n_sources: int, weights: list[float] | None = None
) -> tuple[mx.array, mx.array]:
    """Centre 0 and a scale for each source of ``x [n, n_sources * d]``: its rows come to norm ``sqrt(d)`` on average, times
    the root of its weight, so that its squared error counts ``weight`` times. Float32 ``[n_sources * d]`` each.
    """
    apart = x.astype(mx.float32).reshape(x.shape[0], n_sources, -1)
    d = apart.shape[-1]
    norms = mx.linalg.norm(apart, axis=-1).mean(axis=0)
    if not bool((norms > 0).all()):
        raise ValueError(f"[fit] every source must have a positive mean norm but got {norms.tolist()}.")
    weight = mx.ones(n_sources) if weights is None else mx.array(weights)
    scale = mx.repeat(norms / (math.sqrt(d) * mx.sqrt(weight)), d)
    return mx.zeros_like(scale), scale
