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

    Row ``t`` holds the entries ``offsets[t]`` to ``offsets[t + 1]`` of ``values [nnz]`` (float) and ``indices [nnz]``
    (uint32, ascending in each row). ``offsets [n + 1]`` (int64) begin at 0. Entries from ``offsets[n]`` on are in no row:
    room that was not needed. No op looks at them, and they have no gradient.
    """

    values: mx.array
    indices: mx.array
    offsets: mx.array

    def rows(self) -> mx.array:
        """The row of each entry, ``[nnz]`` int32; ``n`` for entries that are in no row."""
        nnz = self.values.shape[0]
        if self.offsets.shape[0] == 1:
            return mx.zeros(nnz, mx.int32)
        steps = mx.zeros(nnz + 1, mx.int32).at[self.offsets[1:].astype(mx.int32)].add(1)
        return mx.stop_gradient(mx.cumsum(steps)[:nnz])


def to_dense(code: SparseCode | SparseCodeCSR, d_sae: int) -> mx.array:
    """The code as an array ``[..., d_sae]``; differentiable in the values.

    This is the only place where such an array comes into being; nothing in the library needs it to run.
    """
    if isinstance(code, SparseCodeCSR):
        values, indices, offsets = code
        if values.ndim != 1 or values.shape != indices.shape or offsets.ndim != 1:
            raise ValueError(
                "[to_dense] values and indices must have one shape [nnz] and offsets shape [n + 1] but got "
                f"{values.shape}, {indices.shape} and {offsets.shape}."
            )
        n = offsets.shape[0] - 1
        rows = code.rows()
        places = mx.where(rows < n, indices.astype(mx.uint32), mx.array(0, mx.uint32))
        dense = mx.zeros((n + 1, d_sae), values.dtype)  # the last row takes what is in none
        return dense.at[rows, places].add(values)[:n]
    values, indices = code
    if values.shape != indices.shape:
        raise ValueError(
            f"[to_dense] values and indices must have one shape but got {values.shape} and {indices.shape}."
        )
    dense = mx.zeros((*values.shape[:-1], d_sae), values.dtype)
    return mx.put_along_axis(dense, indices.astype(mx.uint32), values, axis=-1)
