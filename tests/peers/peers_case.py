"""One SAE for all peers, and our side of every comparison."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae import SAE
from mlxsae.loss import Forward, Loss
from mlxsae.sae import Rule, TopK
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

    def sae(self, rule: Rule | None = None, **options: Any) -> SAE:
        arrays = {name: mx.array(getattr(self, name)) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        sae = SAE.from_weights(**arrays, rule=TopK(K) if rule is None else rule)  # an empty module is false
        for name, value in options.items():
            setattr(sae, name, value)
        return sae

    def stretched(self) -> Case:
        """With decoder rows of norms from 1/2 to 2, so that weighing by them matters."""
        return self._replace(W_dec=self.W_dec * np.linspace(0.5, 2, D_SAE, dtype=np.float32)[:, None])

    def loss_and_grads(
        self,
        loss: LossConfig | Loss,
        *,
        dead: bool = False,
        sae: SAE | None = None,
        y: np.ndarray | None = None,
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Our loss terms and the gradient of every parameter, in the public shapes; a rule's under their own names."""
        sae, x = sae or self.sae(), mx.array(self.x)
        target = x if y is None else mx.array(y)
        total = loss if isinstance(loss, Loss) else loss.build(sae)

        def of(x: mx.array) -> tuple:
            code, _, pre_acts = sae.learn(x, sae.rule.initial_state())
            y_hat = sae.decode(code, x)
            which = mx.array(self.dead) if dead else None
            forward = Forward(sae, x, target, code, y_hat, which, pre_acts, total.scheduled(0, sae.d_sae))
            value, terms = total(forward)
            return value, terms, y_hat

        (value, terms, y_hat), grads = nn.value_and_grad(sae, of)(x)
        named = {
            "W_enc": np.array(grads["encoder"]["weight"]).T,
            "b_enc": np.array(grads["encoder"]["bias"]),
            "W_dec": np.array(grads["decoder"]["weight"]),
            "b_dec": np.array(grads["decoder"]["bias"]),
        }
        named |= {name: np.array(grad) for name, grad in grads.get("rule", {}).items()}
        if "W_skip" in grads:
            named["W_skip"] = np.array(grads["W_skip"])
        return {"loss": value.item(), "y_hat": np.array(y_hat)} | {
            n: t.item() for n, t in terms.items()
        }, named


def assert_same_grads(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], *names: str) -> None:
    """Each within ``GRAD_RTOL`` of the peer's largest entry; none may be all zero, or the test could not fail."""
    for name in names or ("W_enc", "b_enc", "W_dec", "b_dec"):
        scale = np.abs(theirs[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=GRAD_RTOL * scale, err_msg=name)
