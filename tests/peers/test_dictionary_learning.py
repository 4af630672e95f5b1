"""dictionary_learning 0.1.0 as an oracle: values, losses, gradients, and fifty whole steps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from peers_case import D_IN, D_SAE, LOSS_RTOL, K, N, assert_same_grads

from mlxsae import fit
from mlxsae.train import LossConfig, OptimizerConfig, TrainConfig

STEPS, LR, WHOLE_STEP_RTOL = 50, 3e-3, 1e-3
PARTS = {
    "W_enc": lambda ae: ae.encoder.weight.T,
    "b_enc": lambda ae: ae.encoder.bias,
    "W_dec": lambda ae: ae.decoder.weight.T,
    "b_dec": lambda ae: ae.b_dec,
}


def trainer(case, *, warmup: int = 0):
    t = TopKTrainer(
        steps=STEPS + 1,
        activation_dim=D_IN,
        dict_size=D_SAE,
        k=K,
        layer=0,
        lm_name="none",
        lr=LR,
        warmup_steps=warmup,
        device="cpu",
    )
    with torch.no_grad():
        for name, part in PARTS.items():
            part(t.ae).copy_(torch.from_numpy(getattr(case, name)))
    return t


def grads_of(ae):
    return {
        "W_enc": ae.encoder.weight.grad.numpy().T,
        "b_enc": ae.encoder.bias.grad.numpy(),
        "W_dec": ae.decoder.weight.grad.numpy().T,
        "b_dec": ae.b_dec.grad.numpy(),
    }


def test_reconstruction_loss_and_gradients(case):
    t = trainer(case)
    log = t.loss(torch.from_numpy(case.x), step=0, logging=True)
    loss = t.loss(torch.from_numpy(case.x), step=0)
    loss.backward()
    ours, grads = case.loss_and_grads(LossConfig(reconstruction="mse", auxk=None))
    np.testing.assert_allclose(ours["y_hat"], log.x_hat.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert ours["loss"] == pytest.approx(loss.item(), rel=LOSS_RTOL)
    assert_same_grads(grads, grads_of(t.ae))


def test_auxk(case):
    t = trainer(case)
    t.num_tokens_since_fired[torch.from_numpy(case.dead)] = t.dead_feature_threshold
    # Its counters are updated before the AuxK loss, so a dead latent that fires in this batch is no longer dead.
    fired = np.zeros(D_SAE, bool)
    fired[np.array(case.sae().encode(mx.array(case.x)).indices).flatten()] = True
    loss = t.loss(torch.from_numpy(case.x), step=0)
    loss.backward()
    assert t.dead_features == (case.dead & ~fired).sum() > 0
    ours, grads = case._replace(dead=case.dead & ~fired).loss_and_grads(
        LossConfig(reconstruction="mse", auxk="dictionary_learning"), dead=True
    )
    assert ours["auxk"] > 0
    assert ours["loss"] == pytest.approx(loss.item(), rel=LOSS_RTOL)
    assert_same_grads(grads, grads_of(t.ae))


@pytest.mark.parametrize("engine", ["fused", "autodiff"])
def test_fifty_whole_steps(case, engine):
    """Forward, backward, projection, clipping at 1, Adam, renorm, dead counters: 50 times, on fresh batches."""
    rng = np.random.default_rng(7)
    batches = [
        case.x[rng.permutation(N)] + 0.3 * rng.standard_normal(case.x.shape, np.float32) for _ in range(STEPS)
    ]
    t = trainer(case)
    losses = [
        t.update(i + 1, torch.from_numpy(x)) for i, x in enumerate(batches)
    ]  # its step 0 would move b_dec

    sae = case.sae()
    config = TrainConfig(
        total_tokens=STEPS * N,
        batch_size=N,
        normalize="none",
        b_dec_init="keep",
        engine=engine,
        log_every=1,
        optimizer=OptimizerConfig(learning_rate=LR, betas=(0.9, 0.999), warmup=0, decay=0, max_grad_norm=1.0),
        loss=LossConfig(reconstruction="mse", auxk=None),
    )
    result = fit(sae, [mx.array(x) for x in batches], config)
    assert result.state.step == STEPS
    np.testing.assert_allclose([r["loss"] for r in result.history], losses, rtol=WHOLE_STEP_RTOL)
    assert losses[-1] < 0.97 * losses[0]  # it learns, so the comparison is of something
    for name, part in PARTS.items():
        theirs = part(t.ae).detach().numpy()
        error = np.abs(np.array(getattr(sae, name)) - theirs).max() / np.abs(theirs).max()
        assert error < WHOLE_STEP_RTOL, f"{name}: {error}"
        moved = np.abs(theirs - getattr(case, name)).max() / np.abs(theirs).max()
        assert moved > 10 * WHOLE_STEP_RTOL, f"{name} hardly moved: {moved}"
    since = t.num_tokens_since_fired.numpy()
    np.testing.assert_array_equal(np.array(result.state.tokens_since_fired), since)
