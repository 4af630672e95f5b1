"""Swap a dense MLX sparse autoencoder for ``mlxsae.SAE``: same weights, same numbers, no [tokens, d_sae]
array.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxsae.sae import SAE


class DenseSAE(nn.Module):
    """The usual way: every pre-activation in memory, a sort per token, a product with mostly zeros."""

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__()
        self.W_enc = mx.random.normal((d_in, d_sae)) * d_in**-0.5
        self.W_dec = mx.random.normal((d_sae, d_in)) * d_in**-0.5
        self.b_enc, self.b_dec, self.k = mx.zeros(d_sae), mx.zeros(d_in), k

    def __call__(self, x: mx.array) -> mx.array:
        pre_acts = (x - self.b_dec) @ self.W_enc + self.b_enc
        kth = mx.topk(pre_acts, self.k, axis=-1).min(axis=-1, keepdims=True)
        return mx.where(pre_acts >= kth, nn.relu(pre_acts), 0) @ self.W_dec + self.b_dec


def swap(dense: DenseSAE) -> SAE:
    return SAE.from_weights(dense.W_enc, dense.W_dec, dense.b_enc, dense.b_dec, k=dense.k)


def main() -> None:
    x = mx.random.normal((2, 16, 64))
    dense = DenseSAE(64, 512, k=16)
    ours = swap(dense)
    same = mx.allclose(ours(x), dense(x), rtol=1e-5, atol=1e-5).item()
    print("same numbers" if same else "different numbers")


if __name__ == "__main__":
    main()
