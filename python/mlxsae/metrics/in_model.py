"""An SAE judged inside the language model it was made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxsae.lm import (
    HookPoint,
    LanguageModel,
    TokenBatch,
    only_at,
    run_with_capture,
    token_losses,
    valid_rows,
)
from mlxsae.metrics.streaming import Evaluation, LossRecovered
from mlxsae.sae import SAE


def evaluate_in_model(
    lm: LanguageModel, sae: SAE, hook_point: HookPoint, batches: Iterable[TokenBatch]
) -> dict[str, float]:
    """All metrics of :func:`~mlxsae.metrics.evaluate` on the activations at ``hook_point``, and what splicing costs.

    ``ce_clean``, ``ce_sae``, ``ce_zero``, ``ce_mean``: mean cross entropy of the next token in nats, with the model as
    it is, with the SAE's reconstruction in place of the activation, with zeros, with the activation's mean over these
    very tokens. ``loss_recovered_zero`` and ``loss_recovered_mean``:
    ``(ce_ablated - ce_sae) / (ce_ablated - ce_clean)``.

    Edits act at valid tokens only, and the SAE sees no others; invalid tokens are neither measured nor predicted.
    ``batches`` is walked twice and kept (tokens only). An SAE whose target is another activation than its input cannot be
    judged so.

    Raises
    ------
    ValueError
        No valid token, an SAE whose width is not the model's.
    """
    hook_point = lm.hook_point(hook_point)
    width = lm.shape_at(hook_point)[-1]
    if sae.transcoder or sae.d_in != width:
        kind = "transcoder" if sae.transcoder else "SAE"
        raise ValueError(
            f"[evaluate_in_model] the SAE must have d_in = d_out = {width}, the model's width there, and its input for "
            f"target, but is a {kind} with d_in={sae.d_in} and d_out={sae.d_out}."
        )
    kept: list[tuple[TokenBatch, mx.array]] = []
    measured = Evaluation(sae.d_sae)
    for batch in batches:
        tokens, valid = batch
        if not _targets(batch):
            continue
        logits, found = run_with_capture(lm, tokens, hook_point)
        losses = nn.losses.cross_entropy(logits[:, :-1].astype(mx.float32), tokens[:, 1:])
        clean = _summed(losses, batch)
        x = valid_rows(found[hook_point], valid)
        mx.eval(clean, x)
        code = sae.encode(x)
        measured.update(x, sae.decode(code, x), code)
        kept.append((batch, clean))
    if not kept:
        raise ValueError(
            "[evaluate_in_model] there must be at least one valid token to predict but there is none."
        )

    mean = mx.array(measured.reconstruction.mean, mx.float32)
    edits = {
        "zero": mx.zeros_like,
        "mean": lambda x: mx.broadcast_to(mean.astype(x.dtype), x.shape),
    }
    recovered = LossRecovered()
    for batch, clean in kept:
        at = {"sae": _only_for(sae, batch.valid)} | {
            name: only_at(edit, batch.valid) for name, edit in edits.items()
        }
        sums = {
            name: _summed(token_losses(lm, batch.tokens, edits={hook_point: edit}), batch)
            for name, edit in at.items()
        }
        recovered.update(_targets(batch), clean=clean, **sums)
    return measured.result() | recovered.result()


def _targets(batch: TokenBatch) -> int:
    """Tokens to predict: the valid ones that have a token before them."""
    return int(np.count_nonzero(np.array(batch.valid[:, 1:])))


def _only_for(sae: SAE, valid: mx.array) -> Callable[[mx.array], mx.array]:
    """``sae`` on the rows of valid tokens alone: a BatchTopK without a threshold gives latents to whatever it is shown."""
    places = mx.array(np.flatnonzero(np.array(valid)), mx.uint32)

    def edit(x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        rows[places] = sae(valid_rows(x, valid)).astype(x.dtype)
        return rows.reshape(x.shape)

    return edit


def _summed(losses: mx.array, batch: TokenBatch) -> mx.array:
    return mx.where(batch.valid[:, 1:], losses, 0).sum()


def diagnose(metrics: dict[str, float]) -> Sequence[str]:
    """What is wrong with an SAE, judged by its metrics: one sentence a fault, with what to try; empty where all is well."""
    found = []
    if unknown := [name for name in ("fvu", "ce_clean", "ce_sae") if math.isnan(metrics.get(name, 0.0))]:
        found.append(
            f"{' and '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} NaN: look for numbers that are not finite in "
            "the weights and the activations, and for activations that are all equal."
        )
    if metrics.get("l0", 1.0) == 0:
        found.append(
            "No latent ever fires: the SAE is dead. Lower the learning rate or check the activations."
        )
    if metrics.get("dead_fraction", 0.0) >= 0.5 and metrics.get("l0", 1.0) > 0:
        found.append(
            f"{metrics['dead_fraction']:.0%} of the latents never fired here: train longer, lower the "
            "expansion factor or the learning rate, or switch AuxK on."
        )
    if metrics.get("fvu", 0.0) >= 1 and metrics.get("loss_recovered_mean", 0.0) >= 0.5:
        found.append(
            "The reconstruction is further from the activation than the mean (FVU >= 1), but the model predicts well from "
            "it: training end to end gives such SAEs. For faithful reconstructions train without --end-to-end."
        )
    elif metrics.get("fvu", 0.0) >= 1:
        found.append(
            "The reconstruction is no better than the mean activation (FVU >= 1): train longer or change the learning "
            "rate."
        )
    if metrics.get("loss_recovered_mean", 1.0) < 0:
        found.append("The model predicts worse with this SAE than with the mean activation in its place.")
    return found
