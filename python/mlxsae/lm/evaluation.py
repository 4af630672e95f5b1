"""How well a language model, edited or not, predicts text."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .hook_point import HookPointLike
from .hooks import Edits, network, splice
from .language_model import LanguageModel


def token_losses(
    model: LanguageModel | nn.Module, tokens: mx.array, *, edits: Edits | None = None
) -> mx.array:
    """Cross entropy of each next token, in nats: float32 [b, t - 1], entry j for predicting token j + 1.

    `loss[i, j] = logsumexp(logits[i, j]) - logits[i, j, tokens[i, j + 1]]`, with `edits` as for `splice`.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"[loss] tokens must have shape [b, t] with t >= 2 but got {tokens.shape}.")
    net = network(model)
    with splice(net, edits or {}):
        logits = net(tokens)
    return nn.losses.cross_entropy(logits[:, :-1].astype(mx.float32), tokens[:, 1:])


def loss(
    model: LanguageModel | nn.Module,
    tokens: mx.array,
    valid: mx.array | None = None,
    *,
    edits: Edits | None = None,
) -> mx.array:
    """Mean next-token cross entropy in nats over the targets that are `valid`: a float32 scalar.

    Parameters
    ----------
    model : LanguageModel or an mlx-lm model
    tokens : int [b, t]
    valid : bool [b, t], optional
        As `token_batches` gives it. Token j + 1 is a target where valid[:, j + 1]: predicting BOS or padding
        does not count, predicting from BOS does. All count by default.
    edits : {hook point: function}, optional
        As for `splice`. They act at every position; `only_at(edit, valid)` spares BOS and padding.

    To average over batches, weigh each by `valid[:, 1:].sum()`.

    Raises
    ------
    ValueError
        No valid target, or shapes that do not fit.
    """
    losses = token_losses(model, tokens, edits=edits)
    if valid is None:
        return losses.mean()
    if valid.shape != tokens.shape or valid.dtype != mx.bool_:
        raise ValueError(
            f"[loss] valid must be bool of shape {tokens.shape} but got {valid.dtype} of shape {valid.shape}."
        )
    targets = valid[:, 1:]
    count = targets.sum()
    if not count.item():
        raise ValueError("[loss] valid must mark at least one target but marks none.")
    return mx.where(targets, losses, 0).sum() / count


Continuation = Callable[[mx.array, mx.array, mx.array], mx.array]
"""From rows [n, d], tokens [b, t] and the rows' places [n] in `tokens.reshape(-1)`, ascending."""


def logits_from(model: LanguageModel | nn.Module, hook_point: HookPointLike) -> Continuation:
    """What the model predicts with other activations at a hook point: `f(rows, tokens, places) -> logits`, float32
    [n, vocab], those at the same places.

    Activations at all other places stay. Differentiable in the rows; one forward pass a call.
    """
    net = network(model)

    def logits(rows: mx.array, tokens: mx.array, places: mx.array) -> mx.array:
        n = places.shape[0]
        which = mx.put_along_axis(
            mx.full(tokens.size, n, mx.int32), places, mx.arange(n, dtype=mx.int32), axis=0
        )

        def edit(x: mx.array) -> mx.array:
            other = rows[mx.minimum(which, n - 1)].astype(x.dtype).reshape(x.shape)
            return mx.where((which < n).reshape(*tokens.shape, 1), other, x)

        with splice(net, {hook_point: edit}):
            out = net(tokens)
        return out.reshape(-1, out.shape[-1])[places].astype(mx.float32)

    return logits


def losses_from(model: LanguageModel | nn.Module, hook_point: HookPointLike) -> Continuation:
    """As :func:`logits_from`, but how badly the next token is predicted: [n] in nats.

    0 where the next token is none of the places (the end of a context, padding); the others are scaled so that the mean over
    all rows is the mean over predictions.
    """
    continued = logits_from(model, hook_point)

    def losses(rows: mx.array, tokens: mx.array, places: mx.array) -> mx.array:
        places = places.astype(mx.int32)
        following = mx.concatenate([places[1:], mx.array([-1])])
        counts = (following == places + 1) & (following % tokens.shape[1] != 0)
        targets = tokens.reshape(-1)[mx.maximum(following, 0)]
        each = mx.where(counts, nn.losses.cross_entropy(continued(rows, tokens, places), targets), 0)
        return each * (places.shape[0] / mx.maximum(counts.sum(), 1))

    return losses
