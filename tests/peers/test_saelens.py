"""SAELens 6.54 as an oracle: values, losses, gradients, files."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from peers_case import D_IN, D_SAE, LOSS_RTOL, K, assert_same_grads
from sae_lens import SAE as LensSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import (
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from mlxsae import io
from mlxsae.train import LossConfig

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def filled(sae, case):
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(sae, name).copy_(torch.from_numpy(getattr(case, name)))
    return sae


def training_sae(case, *, rescale: bool):
    config = TopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=rescale, device="cpu"
    )
    return filled(TopKTrainingSAE(config), case)


def step(sae, case, *, dead: bool):
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=torch.from_numpy(case.x),
            coefficients={},
            dead_neuron_mask=torch.from_numpy(case.dead) if dead else None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    out.loss.backward()
    return out, {name: getattr(sae, name).grad.numpy() for name in WEIGHTS}


def test_code_reconstruction_loss_and_gradients(case):
    out, theirs = step(training_sae(case, rescale=False), case, dead=False)
    ours, grads = case.loss_and_grads(LossConfig(reconstruction="mse", auxk=None))
    np.testing.assert_allclose(ours["y_hat"], out.sae_out.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert ours["loss"] == pytest.approx(out.loss.item(), rel=LOSS_RTOL)
    assert_same_grads(grads, theirs)
    code = case.sae().encode(mx.array(case.x))
    dense = np.zeros((len(case.x), D_SAE), np.float32)
    np.put_along_axis(dense, np.array(code.indices).astype(np.int64), np.array(code.values), axis=1)
    np.testing.assert_allclose(dense, out.feature_acts.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_rescaling_by_decoder_norm_changes_nothing_at_unit_rows_but_the_gradient_along_them(case):
    """SAELens' default: latents times |W_dec[j]|, decoding by W_dec[j] / |W_dec[j]|. At unit rows the function is ours;
    its decoder gradient has no part along a row other than through the latent, so ours must equal it across rows."""
    out, theirs = step(training_sae(case, rescale=True), case, dead=False)
    ours, grads = case.loss_and_grads(LossConfig(reconstruction="mse", auxk=None))
    assert ours["loss"] == pytest.approx(out.loss.item(), rel=LOSS_RTOL)

    def across(gradient):
        return gradient - (gradient * case.W_dec).sum(axis=1, keepdims=True) * case.W_dec

    grads["W_dec"], theirs["W_dec"] = across(grads["W_dec"]), across(theirs["W_dec"])
    assert_same_grads(grads, theirs)


def test_auxk(case):
    """Its AuxK loss on raw pre-activations of dead latents, and the gradient of everything."""
    out, theirs = step(training_sae(case, rescale=False), case, dead=True)
    ours, grads = case.loss_and_grads(LossConfig(reconstruction="mse", auxk="saelens"), dead=True)
    assert out.losses["auxiliary_reconstruction_loss"].item() > 0
    assert ours["auxk"] == pytest.approx(out.losses["auxiliary_reconstruction_loss"].item(), rel=LOSS_RTOL)
    assert ours["loss"] == pytest.approx(out.loss.item(), rel=LOSS_RTOL)
    assert_same_grads(grads, theirs)


def test_saelens_loads_what_we_save(case, tmp_path: Path):
    sae = case.sae()
    io.save(sae, tmp_path)
    theirs = LensSAE.load_from_disk(str(tmp_path), device="cpu")
    assert isinstance(theirs, TopKSAE)
    assert theirs.cfg.k == K
    with torch.no_grad():
        expected = theirs(torch.from_numpy(case.x)).numpy()
    np.testing.assert_allclose(np.array(sae(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)
    for name in WEIGHTS:
        np.testing.assert_array_equal(np.array(getattr(sae, name)), getattr(theirs, name).detach().numpy())


@pytest.mark.parametrize("rescale", [False, True])
def test_we_load_what_saelens_saves(case, tmp_path: Path, rescale: bool):
    config = TopKSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=True,
        device="cpu",
    )
    theirs = filled(TopKSAE(config), case)
    if rescale:  # norms that matter
        with torch.no_grad():
            theirs.W_dec *= torch.linspace(0.5, 2, D_SAE)[:, None]
    theirs.save_model(str(tmp_path))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(case.x)).numpy()
    np.testing.assert_allclose(np.array(io.load(tmp_path)(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)


def test_we_load_what_its_training_sae_exports(case, tmp_path: Path):
    theirs = training_sae(case, rescale=True)
    theirs.save_inference_model(str(tmp_path))
    with torch.no_grad():
        expected = LensSAE.load_from_disk(str(tmp_path), device="cpu")(torch.from_numpy(case.x)).numpy()
    np.testing.assert_allclose(np.array(io.load(tmp_path)(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)
