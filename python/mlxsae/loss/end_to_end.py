"""Terms that judge a reconstruction by what the model makes of it (Braun et al. 2024, arXiv 2405.12241).

The model comes as a function of activations. Batches of whole contexts (:class:`~mlxsae.data.ContextActivations`) give it
``(rows, tokens, places)``, the rows as the model has them whatever the run's normalisation: that is what
:func:`mlxsae.lm.logits_from` and :func:`mlxsae.lm.losses_from` take. Of other batches it gets the rows alone. Gradients pass
through it into the SAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxsae.loss.compose import Forward


def _of(model: Callable[..., mx.array], forward: Forward, rows: mx.array) -> mx.array:
    context = forward.context
    if context is None:
        return model(rows)
    return model(rows * context.scale + context.shift, context.tokens, context.places)


@dataclass(frozen=True)
class KL:
    r""":math:`\mathrm{mean}\; KL(p(y) \,\|\, p(\hat y))`, in nats a prediction: the model on the activations against the
    model on their reconstruction.

    ``logits``: from activations ``[n, d_out]`` (and context) to logits ``[..., vocabulary]``. What the model rules out (a
    logit of minus infinity) adds nothing.
    """

    logits: Callable[..., mx.array]

    def __call__(self, forward: Forward) -> mx.array:
        clean, spliced = (
            nn.log_softmax(_of(self.logits, forward, a).astype(mx.float32), axis=-1)
            for a in (mx.stop_gradient(forward.y), forward.y_hat)
        )
        clean = mx.stop_gradient(clean)
        possible = clean != -mx.inf  # 0 * log(0 / q) is 0
        apart = mx.where(possible, clean, 0) - mx.where(possible, spliced, 0)
        return (mx.exp(clean) * apart).sum(axis=-1).mean()


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy of the next token with the reconstruction in place of the activation.

    ``losses``: from activations ``[n, d_out]`` (and context) to one loss a prediction, any shape.
    """

    losses: Callable[..., mx.array]

    def __call__(self, forward: Forward) -> mx.array:
        return _of(self.losses, forward, forward.y_hat).mean()


END_TO_END: dict[str, type[KL] | type[CrossEntropy]] = {"kl": KL, "cross_entropy": CrossEntropy}
"""Those that configurations name."""
