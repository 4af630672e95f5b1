"""Terms that judge a reconstruction by what the model makes of it (Braun et al. 2024, arXiv 2405.12241).

The model comes as a function of the activations alone: for a residual stream, the model from there on. Batches must keep
what that function needs, such as whole contexts in order; gradients pass through it into the SAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxsae.loss.compose import Forward


@dataclass(frozen=True)
class KL:
    r""":math:`\mathrm{mean}\; KL(p(y) \,\|\, p(\hat y))`, in nats a prediction: the model on the activations against the
    model on their reconstruction.

    ``logits``: from activations ``[n, d_out]`` to logits ``[..., vocabulary]``.
    """

    logits: Callable[[mx.array], mx.array]

    def __call__(self, forward: Forward) -> mx.array:
        clean, spliced = (
            nn.log_softmax(self.logits(a).astype(mx.float32), axis=-1)
            for a in (mx.stop_gradient(forward.y), forward.y_hat)
        )
        clean = mx.stop_gradient(clean)
        return (mx.exp(clean) * (clean - spliced)).sum(axis=-1).mean()


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy of the next token with the reconstruction in place of the activation.

    ``losses``: from activations ``[n, d_out]`` to one loss a prediction, any shape.
    """

    losses: Callable[[mx.array], mx.array]

    def __call__(self, forward: Forward) -> mx.array:
        return self.losses(forward.y_hat).mean()
