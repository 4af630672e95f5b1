"""Helpers of the op tests."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxsae import ops

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def array(a, dtype) -> mx.array:
    return mx.array(np.asarray(a, np.float32)).astype(dtype)


def numpy(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def graph_of(op, *args, **options):
    """The op's definition in plain MLX ops, which runs where a device has no kernel."""
    with ops.plain():
        return op(*args, **options)


def finite_difference(f, args, i, step=1e-6):
    """The gradient of a float64 NumPy function in its i-th argument, by central differences."""
    grad = np.zeros_like(args[i], dtype=np.float64)
    for place in np.ndindex(args[i].shape):
        ends = []
        for sign in (1, -1):
            moved = [np.array(a, np.float64) for a in args]
            moved[i][place] += sign * step
            ends.append(f(*moved))
        grad[place] = (ends[0] - ends[1]) / (2 * step)
    return grad
