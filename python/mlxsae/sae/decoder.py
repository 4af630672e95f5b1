"""The linear map out of latent space."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlxsae import ops
from mlxsae.code import Code, DenseCode, SparseCode


class Decoder(nn.Module):
    """Holds ``weight [d_sae, d_out]``, whose rows are the feature directions, and ``bias [d_out]``."""

    def __init__(self, weight: mx.array, bias: mx.array):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def __call__(self, code: Code) -> mx.array:
        """``sum_i values[..., i] * weight[indices[..., i]] + bias``: ``[..., k] -> [..., d_out]``, and ``[n, d_out]`` for
        ``n`` compressed rows.
        """
        if isinstance(code, DenseCode):
            return mx.addmm(self.bias, code.values, self.weight)
        if not isinstance(code, SparseCode):
            return ops.sparse_decode(code, self.weight, self.bias)
        values, indices = code
        lead, k = values.shape[:-1], values.shape[-1]
        flat = SparseCode(values.reshape(math.prod(lead), k), indices.reshape(math.prod(lead), k))
        return ops.sparse_decode(flat, self.weight, self.bias).reshape(*lead, self.weight.shape[1])

    def _extra_repr(self) -> str:
        return f"d_sae={self.weight.shape[0]}, d_out={self.weight.shape[1]}"
