"""The linear map into latent space."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Encoder(nn.Module):
    """Holds ``weight [d_sae, d_in]`` (a latent a row) and ``bias [d_sae]``.

    It does not multiply by itself: a rule with a fused op selects while it multiplies, so that the
    pre-activations ``[n, d_sae]`` never exist. :meth:`pre_acts` is for those who want them.
    """

    def __init__(self, weight: mx.array, bias: mx.array):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def pre_acts(self, x: mx.array) -> mx.array:
        """``x @ weight.T + bias``, dense: ``[..., d_in] -> [..., d_sae]``."""
        return mx.addmm(self.bias, x, self.weight.T)

    def _extra_repr(self) -> str:
        return f"d_in={self.weight.shape[1]}, d_sae={self.weight.shape[0]}"
