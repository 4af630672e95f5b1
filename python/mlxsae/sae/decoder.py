"""The linear map out of latent space."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxsae import ops
from mlxsae.code import Code, DenseCode, SparseCode
from mlxsae.sae.encoder import Encoder


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


class TiedDecoder(Decoder):
    """A decoder whose rows are the encoder's: holds ``bias`` alone."""

    def __init__(self, encoder: Encoder, bias: mx.array):
        nn.Module.__init__(self)
        self.bias = bias
        object.__setattr__(self, "_encoder", encoder)  # a reference, not a child: its weight is trained once

    def __getattr__(self, key: str) -> Any:
        return self._encoder.weight if key == "weight" else super().__getattr__(key)

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "weight":
            self._encoder.weight = value
        else:
            super().__setattr__(key, value)
