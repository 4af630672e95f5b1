"""Sparse codes: the values that travel between encoder, decoder, losses and analysis.

Both are tuples of arrays only, so they pass through ``mx.compile``, ``mx.grad``, ``mx.vmap`` and ``tree_map`` and keep
their type. The width ``d_sae`` lives on the decoder.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class SparseCode(NamedTuple):
    """``k`` latents for each token.

    ``values [..., k]`` (float) and ``indices [..., k]`` (uint32, ascending in each row). A slot whose value is 0 is
    unused: it adds nothing, has no gradient and does not count as fired.
    """

    values: mx.array
    indices: mx.array


class SparseCodeCSR(NamedTuple):
    """A varying number of latents for each token, in compressed sparse rows.

    Row ``t`` holds the entries ``offsets[t]`` to ``offsets[t + 1]`` of ``values [nnz]`` and ``indices [nnz]``.
    """

    values: mx.array
    indices: mx.array
    offsets: mx.array


def to_dense(code: SparseCode, d_sae: int) -> mx.array:
    """The code as an array ``[..., d_sae]``; differentiable in the values.

    This is the only place where such an array comes into being; nothing in the library needs it to run.
    """
    values, indices = code
    if values.shape != indices.shape:
        raise ValueError(
            f"[to_dense] values and indices must have one shape but got {values.shape} and {indices.shape}."
        )
    dense = mx.zeros((*values.shape[:-1], d_sae), values.dtype)
    return mx.put_along_axis(dense, indices.astype(mx.uint32), values, axis=-1)
