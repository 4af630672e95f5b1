"""sparsify 1.3.3 as an oracle: values, FVU, gradients.

Two of its gradients are not truth, and the tests go around them:

* its encoder's backward pass does not mask entries that relu has clipped, so a token with fewer than k positive
  pre-activations sends gradients through zeros (``test_clipped_entries_...`` shows it); the other tests make all k positive;
* its AuxK sends no gradient into the encoder: the encoder's backward pass ignores that of ``pre_acts``. Only loss and
  decoder gradient are compared.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from peers_case import D_IN, D_SAE, LOSS_RTOL, K, assert_same_grads
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

from mlxsae.train import LossConfig


def coder(case):
    c = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    with torch.no_grad():
        c.encoder.weight.copy_(torch.from_numpy(case.W_enc).T)
        c.encoder.bias.copy_(torch.from_numpy(case.b_enc))
        c.W_dec.copy_(torch.from_numpy(case.W_dec))
        c.b_dec.copy_(torch.from_numpy(case.b_dec))
    return c


def grads_of(c):
    return {
        "W_enc": c.encoder.weight.grad.numpy().T,
        "b_enc": c.encoder.bias.grad.numpy(),
        "W_dec": c.W_dec.grad.numpy(),
        "b_dec": c.b_dec.grad.numpy(),
    }


def test_code_reconstruction_fvu_and_gradients(case):
    c = coder(case)
    out = c(torch.from_numpy(case.x))
    assert (out.latent_acts > 0).all()
    out.fvu.backward()
    ours, grads = case.loss_and_grads(LossConfig(reconstruction="fvu", auxk=None))
    np.testing.assert_allclose(ours["y_hat"], out.sae_out.detach().numpy(), rtol=1e-4, atol=1e-4)
    code = case.sae().encode(mx.array(case.x))
    np.testing.assert_array_equal(np.array(code.indices), np.sort(out.latent_indices.numpy(), axis=1))
    assert ours["loss"] == pytest.approx(out.fvu.item(), rel=LOSS_RTOL)
    assert_same_grads(grads, grads_of(c))


def test_auxk_loss_and_decoder_gradient(case):
    weight = 1 / 32
    c = coder(case)
    out = c(torch.from_numpy(case.x), dead_mask=torch.from_numpy(case.dead))
    (out.fvu + weight * out.auxk_loss).backward()
    ours, grads = case.loss_and_grads(
        LossConfig(reconstruction="fvu", auxk="sparsify", auxk_weight=weight), dead=True
    )
    assert out.auxk_loss.item() > 0
    assert ours["auxk"] == pytest.approx(out.auxk_loss.item(), rel=LOSS_RTOL)
    assert_same_grads(grads, grads_of(c), "W_dec")


def test_clipped_entries_carry_no_gradient_here_but_do_there(case):
    """With biases so low that most of the k are clipped, the gradients differ by exactly its unmasked part."""
    case = case._replace(b_enc=case.b_enc - 2.5)
    c = coder(case)
    out = c(torch.from_numpy(case.x))
    clipped = (out.latent_acts == 0).float().mean().item()
    assert 0.05 < clipped < 1
    out.fvu.backward()
    ours, grads = case.loss_and_grads(LossConfig(reconstruction="fvu", auxk=None))
    assert ours["loss"] == pytest.approx(out.fvu.item(), rel=LOSS_RTOL)
    assert_same_grads(grads, grads_of(c), "W_dec")
    with pytest.raises(AssertionError, match="b_enc"):
        assert_same_grads(grads, grads_of(c), "b_enc")
