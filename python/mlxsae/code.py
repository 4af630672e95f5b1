"""Codes: the values that travel between encoder, decoder, losses and analysis.

All are tuples of arrays only, so they pass through ``mx.compile``, ``mx.grad``, ``mx.vmap`` and ``tree_map`` and keep
their type. The width ``d_sae`` lives on the decoder.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

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


class DenseCode(NamedTuple):
    """All latents of each token, ``values [..., d_sae]``.

    For the training of rules whose gradient needs what does not fire (a learned threshold, a gate), and for rules that
    are given as functions of pre-activations. A latent fires where its value is greater than 0.
    """

    values: mx.array


Sparse = SparseCode | SparseCodeCSR
Code = Sparse | DenseCode
AnyCode = TypeVar("AnyCode", bound=Code)


def n_tokens(code: Code) -> int:
    """How many tokens a code is of, over all leading axes."""
    if isinstance(code, SparseCodeCSR):
        return code.offsets.size - 1
    return math.prod(code.values.shape[:-1])


def between(code: AnyCode, low: int | mx.array, high: int | mx.array) -> AnyCode:
    """The code with none but its latents in ``[low, high)``; shapes stay."""
    places = mx.arange(code.values.shape[-1]) if isinstance(code, DenseCode) else code.indices
    inside = (places >= low) & (places < high)
    return code._replace(values=mx.where(inside, code.values, mx.zeros_like(code.values)))


def to_slots(code: Code) -> SparseCode:
    """The code with as many slots a token as its fullest token needs, ``[n, width]`` for compressed rows; a ``SparseCode``
    as it is. Waits for the code. Negative latents of a ``DenseCode`` are left out.
    """
    if isinstance(code, SparseCode):
        return code
    if isinstance(code, DenseCode):
        values = mx.maximum(code.values, 0)
        width = max(1, int((values > 0).sum(axis=-1).max()) if values.size else 1)  # type: ignore[arg-type]
        places = mx.sort(mx.argpartition(-values, width - 1, axis=-1)[..., :width], axis=-1)
        return SparseCode(mx.take_along_axis(values, places, axis=-1), places.astype(mx.uint32))
    begins = code.offsets[:-1, None]
    counts = code.offsets[1:, None] - begins
    slots = mx.arange(max(1, int(counts.max()) if counts.size else 1))  # type: ignore[arg-type]
    if code.values.size == 0:
        empty = (counts.shape[0], slots.size)
        return SparseCode(mx.zeros(empty, code.values.dtype), mx.zeros(empty, mx.uint32))
    places = mx.minimum(begins + slots, code.values.size - 1)
    return SparseCode(
        mx.where(slots < counts, code.values[places], mx.zeros((), code.values.dtype)),
        mx.where(slots < counts, code.indices[places], mx.array(0, mx.uint32)),
    )


def detached(code: AnyCode) -> AnyCode:
    """The code as a constant."""
    return type(code)(*map(mx.stop_gradient, code))


def to_dense(code: Code, d_sae: int) -> mx.array:
    """The code as an array ``[..., d_sae]``; differentiable in the values. Entries of one token that name the same latent
    add up, as they do in the decoder; one of a latent that is not below ``d_sae`` makes its token's last latent NaN.

    No rule with a fused op needs such an array to run.
    """
    if d_sae < 1:
        raise ValueError(f"[to_dense] d_sae must be positive but got {d_sae}.")
    if isinstance(code, DenseCode):
        if code.values.shape[-1] != d_sae:
            raise ValueError(f"[to_dense] values must have shape [..., {d_sae}] but got {code.values.shape}.")
        return code.values
    if isinstance(code, SparseCodeCSR):
        values, indices, offsets = code
        if values.ndim != 1 or values.shape != indices.shape or offsets.ndim != 1:
            raise ValueError(
                "[to_dense] values and indices must have one shape [nnz] and offsets shape [n + 1] but got "
                f"{values.shape}, {indices.shape} and {offsets.shape}."
            )
        n = offsets.shape[0] - 1
        # The last row takes what is in none.
        return _scattered(values, indices, code.rows(), (n + 1, d_sae))[:n]
    values, indices = code
    if values.shape != indices.shape:
        raise ValueError(
            f"[to_dense] values and indices must have one shape but got {values.shape} and {indices.shape}."
        )
    *lead, k = values.shape
    n = math.prod(lead)
    if n == 0:
        return mx.zeros((*lead, d_sae), values.dtype)
    rows = mx.arange(n)[:, None]
    dense = _scattered(values.reshape(n, k), indices.reshape(n, k), rows, (n, d_sae))
    return dense.reshape(*lead, d_sae)


def _scattered(values: mx.array, indices: mx.array, rows: mx.array, shape: tuple[int, int]) -> mx.array:
    # MLX writes wherever an index points, past the end of the array too.
    inside = (indices >= 0) & (indices < shape[1])
    places = mx.where(inside, indices, shape[1] - 1).astype(mx.uint32)
    values = mx.where(inside | (values == 0), values, mx.array(math.nan, values.dtype))
    return mx.zeros(shape, values.dtype).at[rows, places].add(values)
