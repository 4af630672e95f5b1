"""One SAE for all peers, and our side of every comparison."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae import SAE
from mlxsae.loss import Forward
from mlxsae.train import LossConfig

N, D_IN, D_SAE, K = 96, 40, 352, 9
LOSS_RTOL, GRAD_RTOL = 1e-5, 1e-4


class Case(NamedTuple):
    """One SAE's weights in the public shapes, a batch, and which latents are dead."""

    W_enc: np.ndarray  # [d_in, d_sae]
    b_enc: np.ndarray
    W_dec: np.ndarray  # [d_sae, d_in], rows of unit norm
    b_dec: np.ndarray
    x: np.ndarray
    dead: np.ndarray

    def sae(self) -> SAE:
        arrays = {name: mx.array(getattr(self, name)) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        return SAE.from_weights(**arrays, k=K)

    def loss_and_grads(self, loss: LossConfig, *, dead: bool = False) -> tuple[dict, dict[str, np.ndarray]]:
        """Our loss terms and the gradient of every parameter, in the public shapes."""
        sae, x = self.sae(), mx.array(self.x)
        total = loss.build(sae)

        def of(x: mx.array) -> tuple:
            code = sae.encode(x)
            y_hat = sae.decode(code)
            value, terms = total(Forward(sae, x, x, code, y_hat, mx.array(self.dead) if dead else None))
            return value, terms, y_hat

        (value, terms, y_hat), grads = nn.value_and_grad(sae, of)(x)
        named = {
            "W_enc": np.array(grads["encoder"]["weight"]).T,
            "b_enc": np.array(grads["encoder"]["bias"]),
            "W_dec": np.array(grads["decoder"]["weight"]),
            "b_dec": np.array(grads["decoder"]["bias"]),
        }
        return {"loss": value.item(), "y_hat": np.array(y_hat)} | {
            n: t.item() for n, t in terms.items()
        }, named


def assert_same_grads(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], *names: str) -> None:
    """Each within ``GRAD_RTOL`` of the peer's largest entry; none may be all zero, or the test could not fail."""
    for name in names or ("W_enc", "b_enc", "W_dec", "b_dec"):
        scale = np.abs(theirs[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=GRAD_RTOL * scale, err_msg=name)
