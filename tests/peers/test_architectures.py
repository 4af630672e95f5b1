"""Every architecture and loss that we share with SAELens, dictionary_learning and sparsify: same weights, same batch, same
loss within 1e-5 and same gradients within 1e-4.

What of theirs is not taken as truth, and so not compared:

* SAELens' BatchTopK threshold: a moving average that starts at 0 and is never corrected (after 5 steps a twentieth of the
  true one); and its Gated does not detach the decoder in the gate's reconstruction (its issue 539; ours does by default,
  and is compared with ``detach=False``);
* dictionary_learning's JumpReLU: its step function gets the latents, not the pre-activations, so a threshold feels only what
  lies above it, and rounds nothing below: the gradient of its L0 term with respect to thresholds. Loss, and all gradients
  without that term, are compared;
* dictionary_learning's Matryoshka divides by the number of groups twice (default weights, then their mean), and SAELens' not
  at all: compared with these factors put in;
* sparsify's encoder gets no gradient from Multi-TopK or AuxK: only loss and decoder gradients are compared.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from peers_case import D_IN, D_SAE, LOSS_RTOL, K, assert_same_grads
from sae_lens import SAE as LensSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

from mlxsae import io
from mlxsae import loss as L
from mlxsae.sae import BatchTopK, Crosscoder, CrossLayerTranscoder, Gated, GroupMax, JumpReLU, ReLU, TopK

MSE = {"mse": (1.0, L.mse)}
FVU = {"fvu": (1.0, L.fvu)}


def put(module, **arrays) -> None:
    with torch.no_grad():
        for name, a in arrays.items():
            target = module
            for part in name.split("__"):
                target = getattr(target, part)
            target.copy_(torch.from_numpy(np.ascontiguousarray(a)))


def lens(kind, config_type, case, coefficients, *, dead=False, extra=None, **options):
    """SAELens' training SAE with the case's weights: its step's output, and every gradient by its name."""
    options = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu", "apply_b_dec_to_input": True} | options
    sae = kind(config_type(**options))
    arrays = {name: getattr(case, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | (extra or {})
    put(sae, **{name: a for name, a in arrays.items() if hasattr(sae, name)})
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=torch.from_numpy(case.x),
            coefficients=coefficients,
            dead_neuron_mask=torch.from_numpy(case.dead) if dead else None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    out.loss.backward()
    return sae, out, {name: p.grad.numpy() for name, p in sae.named_parameters() if p.grad is not None}


def compare(ours, grads, loss, theirs, names=("W_enc", "b_enc", "W_dec", "b_dec")) -> None:
    assert ours["loss"] == pytest.approx(loss, rel=LOSS_RTOL)
    assert_same_grads(grads, theirs, *names)


def across(gradient, case):
    """Less its part along the decoder's unit rows."""
    return gradient - (gradient * case.W_dec).sum(axis=1, keepdims=True) * case.W_dec


# ---- SAELens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_lens_standard(case, p):
    case = case.stretched()
    _, out, theirs = lens(StandardTrainingSAE, StandardTrainingSAEConfig, case, {"l1": 0.3}, lp_norm=p)
    term = L.L1() if p == 1 else L.Lp(p, root=True)
    ours, grads = case.loss_and_grads(L.Loss(MSE, terms={"l": (0.3, term)}), sae=case.sae(ReLU()))
    compare(ours, grads, out.loss.item(), theirs)


def test_lens_gated(case):
    case, rng = case.stretched(), np.random.default_rng(3)
    extra = {
        "r_mag": 0.2 * rng.standard_normal(D_SAE, np.float32),
        "b_mag": 0.2 * rng.standard_normal(D_SAE, np.float32),
    }
    _, out, theirs = lens(
        GatedTrainingSAE, GatedTrainingSAEConfig, case, {"l1": 0.3}, extra=extra | {"b_gate": case.b_enc}
    )
    sae = case.sae(Gated())
    sae.rule.r_mag, sae.rule.b_mag = map(mx.array, extra.values())
    terms = {"l1": (0.3, L.GateL1()), "gate": (1.0, L.GateReconstruction(detach=False))}
    ours, grads = case.loss_and_grads(L.Loss(MSE, terms=terms), sae=sae)
    theirs["b_enc"] = theirs.pop("b_gate")
    compare(ours, grads, out.loss.item(), theirs, ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag"))


@pytest.mark.parametrize("through_input", [False, True])
@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
def test_lens_jumprelu(case, mode, through_input):
    case = case.stretched()
    threshold = np.random.default_rng(3).uniform(0, 1, D_SAE).astype(np.float32)
    _, out, theirs = lens(
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        case,
        {"l0": 0.3},
        dead=True,
        extra={"threshold": threshold},
        jumprelu_bandwidth=0.4,
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_ste_to_input=through_input,
        target_l0=30.0,
        pre_act_loss_coefficient=0.01,
    )
    rule = JumpReLU.of(mx.array(threshold), bandwidth=0.4, through_input=through_input)
    term = {"step": L.L0(), "tanh": L.Tanh(4.0), "quadratic": L.L0Quadratic(30.0)}[mode]
    loss = L.Loss(MSE, terms={"l0": (0.3, term), "pre_acts": (0.01, L.PreActs())})
    ours, grads = case.loss_and_grads(loss, sae=case.sae(rule), dead=True)
    assert ours["pre_acts"] > 0
    compare(ours, grads, out.loss.item(), theirs, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))


def test_lens_batch_topk(case):
    sae, out, theirs = lens(
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        case,
        {},
        dead=True,
        k=K,
        rescale_acts_by_decoder_norm=False,
    )
    mine = case.sae(BatchTopK(K))
    loss = L.Loss(MSE, auxk=(1.0, L.AuxK(D_IN // 2, "saelens")))
    ours, grads = case.loss_and_grads(loss, sae=mine, dead=True)
    compare(ours, grads, out.loss.item(), theirs)
    state = mine.learn(mx.array(case.x), mine.rule.initial_state()).state
    assert state["last"].item() == pytest.approx(sae.topk_threshold.item() / 0.01, rel=1e-5)


@pytest.mark.parametrize("rule", [TopK, BatchTopK])
def test_lens_ranks_by_decoder_norm(case, rule):
    case = case.stretched()
    kinds = {
        TopK: (TopKTrainingSAE, TopKTrainingSAEConfig),
        BatchTopK: (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }[rule]
    _, out, theirs = lens(*kinds, case, {}, k=K, rescale_acts_by_decoder_norm=True)
    sae = case.sae(rule(K), rank_by_decoder_norm=True)
    ours, grads = case.loss_and_grads(L.Loss(MSE), sae=sae)
    compare(ours, grads, out.loss.item(), theirs)


def test_lens_matryoshka(case):
    widths = [40, 100, D_SAE]
    _, out, theirs = lens(
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        case,
        {},
        dead=True,
        k=K,
        matryoshka_widths=widths,
        rescale_acts_by_decoder_norm=False,
    )
    loss = L.Loss(
        {"mse": (3.0, L.mse)},  # it adds the levels up
        auxk=(1.0, L.AuxK(D_IN // 2, "saelens")),
        prefixes=L.FixedPrefixes((40, 100)),
    )
    ours, grads = case.loss_and_grads(loss, sae=case.sae(BatchTopK(K)), dead=True)
    compare(ours, grads, out.loss.item(), theirs)


@pytest.mark.parametrize("rule", ["batchtopk", "jumprelu", "relu", "gated"])
def test_lens_loads_what_we_save_and_we_what_it_does(case, tmp_path: Path, rule):
    rng = np.random.default_rng(5)
    made = {
        "batchtopk": lambda: BatchTopK(K, threshold=0.8),
        "jumprelu": lambda: JumpReLU.of(mx.array(rng.random(D_SAE, np.float32))),
        "relu": ReLU,
        "gated": Gated,
    }[rule]()
    sae = case.sae(made)
    if rule == "gated":
        made.r_mag = mx.array(0.2 * rng.standard_normal(D_SAE, np.float32))
        made.b_mag = mx.array(0.2 * rng.standard_normal(D_SAE, np.float32))
    io.save(sae, tmp_path / "ours")
    theirs = LensSAE.load_from_disk(str(tmp_path / "ours"), device="cpu")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(case.x)).numpy()
    assert np.abs(expected - case.b_dec).max() > 0.1
    np.testing.assert_allclose(np.array(sae(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)
    theirs.save_model(str(tmp_path / "theirs"))
    again = io.load(tmp_path / "theirs")
    np.testing.assert_allclose(np.array(again(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "gated", "relu"])
def test_lens_normalises_each_token_as_we_do(case, tmp_path: Path, rule):
    made = {"topk": TopK(K), "batchtopk": BatchTopK(K, threshold=0.3), "gated": Gated(), "relu": ReLU()}[rule]
    sae = case.sae(made, normalize_activations="layer_norm")
    io.save(sae, tmp_path / "ours")
    theirs = LensSAE.load_from_disk(str(tmp_path / "ours"), device="cpu")
    x = case.x * np.linspace(0.1, 10, len(case.x), dtype=np.float32)[:, None]
    with torch.no_grad():
        acts = theirs.encode(torch.from_numpy(x)).numpy()
        expected = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(np.array(sae.to_dense(sae.encode(mx.array(x)))), acts, rtol=1e-4, atol=1e-4)
    assert (acts > 0).any()
    np.testing.assert_allclose(np.array(sae(mx.array(x))), expected, rtol=1e-4, atol=1e-3)
    theirs.save_model(str(tmp_path / "theirs"))
    np.testing.assert_allclose(
        np.array(io.load(tmp_path / "theirs")(mx.array(x))), expected, rtol=1e-4, atol=1e-3
    )


# No peer here has a crosscoder: its loss is put together from what SAELens has.


def crosscoder(case, rule, **options):
    sae = Crosscoder(D_IN // 2, 2, D_SAE, rule=rule, **options)
    sae.encoder.weight, sae.decoder.weight = mx.array(case.W_enc.T), mx.array(case.W_dec)
    sae.encoder.bias, sae.decoder.bias = mx.array(case.b_enc), mx.array(case.b_dec)
    return sae


def test_lens_parts_make_a_crosscoder(case):
    """Its standard SAE weighs L1 by the norm of the decoder's row. With all but one source's columns at 0 that is the norm of
    this source's part; the penalties of both sources, added up, are the crosscoder's."""
    case, standard = case.stretched(), (StandardTrainingSAE, StandardTrainingSAEConfig)
    _, out, theirs = lens(*standard, case, {"l1": 0.0}, apply_b_dec_to_input=False)
    loss, theirs = out.loss.item(), {name: g.astype(np.float64) for name, g in theirs.items()}
    for columns in (slice(0, D_IN // 2), slice(D_IN // 2, D_IN)):
        w_dec = np.zeros_like(case.W_dec)
        w_dec[:, columns] = case.W_dec[:, columns]
        one = case._replace(W_dec=w_dec)
        for sign, weight in ((1, 0.3), (-1, 0.0)):
            _, out, grads = lens(*standard, one, {"l1": weight}, apply_b_dec_to_input=False)
            loss += sign * out.loss.item()
            for name, g in grads.items():
                theirs[name] += sign * g
    ours, grads = case.loss_and_grads(
        L.Loss(MSE, terms={"l1": (0.3, L.L1())}), sae=crosscoder(case, ReLU(), rank_by_decoder_norm=False)
    )
    compare(ours, grads, loss, theirs)


def test_lens_batch_topk_makes_a_crosscoder(case):
    """Ranking by ``f_j c_j`` with c the sum of the sources' decoder norms is its plain BatchTopK on weights with c put into
    the encoder and taken out of the decoder; gradients follow by the chain rule."""
    case = case.stretched()
    c = np.linalg.norm(case.W_dec.reshape(D_SAE, 2, -1), axis=-1).sum(axis=1)
    moved = case._replace(W_enc=case.W_enc * c, b_enc=case.b_enc * c, W_dec=case.W_dec / c[:, None])
    _, out, theirs = lens(
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        moved,
        {},
        k=K,
        rescale_acts_by_decoder_norm=False,
        apply_b_dec_to_input=False,
    )
    theirs = {"W_enc": theirs["W_enc"] * c, "b_enc": theirs["b_enc"] * c} | {
        "W_dec": theirs["W_dec"] / c[:, None],
        "b_dec": theirs["b_dec"],
    }
    ours, grads = case.loss_and_grads(L.Loss(MSE), sae=crosscoder(case, BatchTopK(K)))
    compare(ours, grads, out.loss.item(), theirs)


@pytest.mark.parametrize("rule", ["jumprelu", "relu"])
def test_lens_loads_our_skip_transcoders(case, tmp_path: Path, rule):
    rng = np.random.default_rng(5)
    made = ReLU() if rule == "relu" else JumpReLU.of(mx.array(rng.random(D_SAE, np.float32)))
    skip = mx.array(0.1 * rng.standard_normal((D_IN, D_IN), np.float32))
    sae = case.sae(made, apply_b_dec_to_input=False, W_skip=skip)
    io.save(sae, tmp_path / "ours")
    theirs = LensSAE.load_from_disk(str(tmp_path / "ours"), device="cpu")
    with torch.no_grad():
        x = torch.from_numpy(case.x)
        expected = theirs(x).numpy()
    np.testing.assert_allclose(np.array(sae(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)
    theirs.save_model(str(tmp_path / "theirs"))
    again = io.load(tmp_path / "theirs")
    np.testing.assert_allclose(np.array(again(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["jumprelu", "relu"])
def test_transcoders_of_one_width_stay_transcoders(case, tmp_path: Path, rule):
    rng = np.random.default_rng(5)
    made = ReLU() if rule == "relu" else JumpReLU.of(mx.array(rng.random(D_SAE, np.float32)))
    sae = case.sae(made, apply_b_dec_to_input=False)
    sae.transcoder = True
    io.save(sae, tmp_path / "ours")
    theirs = LensSAE.load_from_disk(str(tmp_path / "ours"), device="cpu")
    assert theirs.cfg.architecture() == {"relu": "transcoder", "jumprelu": "jumprelu_transcoder"}[rule]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(case.x)).numpy()
    theirs.save_model(str(tmp_path / "theirs"))
    again = io.load(tmp_path / "theirs")
    assert again.transcoder
    assert not io.load(save_plain(case, tmp_path / "plain")).transcoder
    for mine in (sae, again):
        np.testing.assert_allclose(np.array(mine(mx.array(case.x))), expected, rtol=1e-4, atol=1e-4)


def save_plain(case, directory: Path) -> Path:
    io.save(case.sae(ReLU(), apply_b_dec_to_input=False), directory)
    return directory


# ---- circuit-tracer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [ReLU(), JumpReLU(3)], ids=lambda r: r.architecture)
def test_circuit_tracer_loads_our_cross_layer_transcoders_and_we_its(tmp_path: Path, rule):
    clt = CrossLayerTranscoder(6, 3, 20, rule=rule, seed=0)
    clt.W_decs = [mx.random.normal(w.shape, key=mx.random.key(i)) for i, w in enumerate(clt.W_decs)]
    clt.decoder.bias = mx.random.normal((18,), key=mx.random.key(9))
    for i, own in enumerate(clt.rule.layers if isinstance(rule, JumpReLU) else ()):
        own.threshold = mx.random.uniform(shape=(20,), key=mx.random.key(i))
    io.save(clt, tmp_path / "ours")
    x = mx.random.normal((7, 3, 6), key=mx.random.key(3))
    expected = np.array(clt(x))
    theirs = load_clt(
        str(tmp_path / "ours"), dtype=torch.float32, lazy_decoder=False, device=torch.device("cpu")
    )
    with torch.no_grad():
        got = theirs(torch.from_numpy(np.array(x).transpose(1, 0, 2))).numpy().transpose(1, 0, 2)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    theirs.to_safetensors(str(tmp_path / "theirs"))
    np.testing.assert_array_equal(np.array(io.load(tmp_path / "theirs")(x)), expected)
    io.save(CrossLayerTranscoder(6, 3, 20, k=3, seed=0), tmp_path / "topk")
    with pytest.raises(FileNotFoundError):  # it has no TopK here and must not take one for a ReLU
        load_clt(str(tmp_path / "topk"), dtype=torch.float32, device=torch.device("cpu"))


# ---- dictionary_learning --------------------------------------------------------------------------------------

LINEAR = {
    "W_enc": lambda ae: ae.encoder.weight.grad.numpy().T,
    "W_dec": lambda ae: ae.decoder.weight.grad.numpy().T,
}
COMMON = dict(steps=100, activation_dim=D_IN, dict_size=D_SAE, layer=0, lm_name="none", device="cpu")


def backward(trainer, case, step=0):
    loss = trainer.loss(torch.from_numpy(case.x), step=step)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("trainer_type", [StandardTrainer, StandardTrainerAprilUpdate])
def test_dl_standard(case, trainer_type):
    case = case.stretched() if trainer_type is StandardTrainerAprilUpdate else case
    t = trainer_type(**COMMON, l1_penalty=0.3, warmup_steps=0, sparsity_warmup_steps=None)
    put(
        t.ae,
        encoder__weight=case.W_enc.T,
        encoder__bias=case.b_enc,
        decoder__weight=case.W_dec.T,
        bias=case.b_dec,
    ) if hasattr(t.ae, "bias") else put(
        t.ae,
        encoder__weight=case.W_enc.T,
        encoder__bias=case.b_enc,
        decoder__weight=case.W_dec.T,
        decoder__bias=case.b_dec,
    )
    loss = backward(t, case)
    theirs = {name: get(t.ae) for name, get in LINEAR.items()}
    theirs |= {
        "b_enc": t.ae.encoder.bias.grad.numpy(),
        "b_dec": (t.ae.bias if hasattr(t.ae, "bias") else t.ae.decoder.bias).grad.numpy(),
    }
    centred = hasattr(t.ae, "bias")  # the April update does not subtract its bias from the input
    sae = case.sae(ReLU(), apply_b_dec_to_input=centred)
    ours, grads = case.loss_and_grads(L.Loss(MSE, terms={"l1": (0.3, L.L1())}), sae=sae)
    if (
        centred
    ):  # nor does the older one weigh by decoder norms: at unit rows only the gradient along them differs
        for g in (grads, theirs):
            g["W_dec"] = across(g["W_dec"], case)
    compare(ours, grads, loss, theirs)


@pytest.mark.parametrize("root", [False, True])
def test_dl_p_annealing(case, root):
    p = 0.6
    t = PAnnealTrainer(
        **COMMON, sparsity_function="Lp" if root else "Lp^p", initial_sparsity_penalty=0.01, p_start=p,
        warmup_steps=0, sparsity_warmup_steps=None, anneal_start=50,
    )  # fmt: skip
    put(
        t.ae,
        encoder__weight=case.W_enc.T,
        encoder__bias=case.b_enc,
        decoder__weight=case.W_dec.T,
        bias=case.b_dec,
    )
    loss = backward(t, case)
    theirs = {name: get(t.ae) for name, get in LINEAR.items()}
    theirs |= {"b_enc": t.ae.encoder.bias.grad.numpy(), "b_dec": t.ae.bias.grad.numpy()}
    # Its penalty ignores decoder norms; at unit rows only the gradient along them differs.
    term = L.Lp(L.anneal(p, 0.2, 50, 100), root=root)
    ours, grads = case.loss_and_grads(L.Loss(MSE, terms={"lp": (0.01, term)}), sae=case.sae(ReLU()))
    for g in (grads, theirs):
        g["W_dec"] = across(g["W_dec"], case)
    compare(ours, grads, loss, theirs)


@pytest.mark.parametrize("p", [None, 1.0, 0.6])
def test_dl_gated(case, p):
    """With p its annealed form, a power of the gate."""
    rng = np.random.default_rng(3)
    extra = {
        "r_mag": 0.2 * rng.standard_normal(D_SAE, np.float32),
        "b_mag": 0.2 * rng.standard_normal(D_SAE, np.float32),
    }
    common = dict(**COMMON, warmup_steps=0, sparsity_warmup_steps=None)
    if p is None:
        t = GatedSAETrainer(**common, l1_penalty=0.3)
    else:
        annealed = dict(sparsity_function="Lp^p", p_start=p, anneal_start=50)
        t = GatedAnnealTrainer(**common, **annealed, initial_sparsity_penalty=0.3)
    put(
        t.ae, encoder__weight=case.W_enc.T, gate_bias=case.b_enc, decoder__weight=case.W_dec.T, decoder_bias=case.b_dec,
        r_mag=extra["r_mag"], mag_bias=extra["b_mag"],
    )  # fmt: skip
    loss = backward(t, case)
    theirs = {name: get(t.ae) for name, get in LINEAR.items()} | {
        "b_enc": t.ae.gate_bias.grad.numpy(),
        "b_dec": t.ae.decoder_bias.grad.numpy(),
        "r_mag": t.ae.r_mag.grad.numpy(),
        "b_mag": t.ae.mag_bias.grad.numpy(),
    }
    sae = case.sae(Gated())
    sae.rule.r_mag, sae.rule.b_mag = map(mx.array, extra.values())
    gate = L.GateL1() if p is None else L.Lp(L.anneal(p, 0.2, 50, 100), gate=True)
    terms = {"l1": (0.3, gate), "gate": (1.0, L.GateReconstruction())}
    ours, grads = case.loss_and_grads(L.Loss(MSE, terms=terms), sae=sae)
    for g in (grads, theirs):  # as above: no norms in its penalty
        g["W_dec"] = across(g["W_dec"], case)
    compare(ours, grads, loss, theirs, ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag"))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_dl_jumprelu(case, penalty):
    threshold = np.random.default_rng(3).uniform(0, 1, D_SAE).astype(np.float32)
    t = JumpReluTrainer(
        **COMMON,
        bandwidth=0.4,
        sparsity_penalty=penalty,
        target_l0=30.0,
        warmup_steps=0,
        sparsity_warmup_steps=None,
    )
    put(t.ae, W_enc=case.W_enc, b_enc=case.b_enc, W_dec=case.W_dec, b_dec=case.b_dec, threshold=threshold)
    loss = backward(t, case)
    theirs = {name: p.grad.numpy() for name, p in t.ae.named_parameters() if p.grad is not None}
    rule = JumpReLU.of(mx.array(threshold), bandwidth=0.4, through_input=False)
    sae = case.sae(rule, apply_b_dec_to_input=False)
    ours, grads = case.loss_and_grads(L.Loss(MSE, terms={"l0": (penalty, L.L0Target(30.0))}), sae=sae)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    if penalty == 0:
        theirs["threshold"] = (
            theirs["threshold"].sum(axis=0) if theirs["threshold"].ndim > 1 else theirs["threshold"]
        )
        names += ("threshold",)
    compare(ours, grads, loss, theirs, names)


@pytest.mark.parametrize("matryoshka", [False, True])
def test_dl_batch_topk_and_matryoshka(case, matryoshka):
    options = dict(**COMMON, k=K, warmup_steps=0)
    if matryoshka:
        t = MatryoshkaBatchTopKTrainer(**options, group_fractions=[0.25, 0.25, 0.5])
        put(t.ae, W_enc=case.W_enc, b_enc=case.b_enc, W_dec=case.W_dec, b_dec=case.b_dec)
    else:
        t = BatchTopKTrainer(**options)
        put(
            t.ae,
            encoder__weight=case.W_enc.T,
            encoder__bias=case.b_enc,
            decoder__weight=case.W_dec.T,
            b_dec=case.b_dec,
        )
    sae = case.sae(BatchTopK(K))
    # Its counters are updated before the AuxK loss, so a dead latent that fires in this batch is no longer dead.
    fired = np.zeros(D_SAE, bool)
    code = sae.encode(mx.array(case.x))
    fired[np.array(code.indices)[np.array(code.values) > 0]] = True
    t.num_tokens_since_fired[torch.from_numpy(case.dead)] = t.dead_feature_threshold
    loss = backward(t, case)
    if matryoshka:
        theirs = {name: p.grad.numpy() for name, p in t.ae.named_parameters() if p.grad is not None}
    else:
        theirs = {name: get(t.ae) for name, get in LINEAR.items()}
        theirs |= {"b_enc": t.ae.encoder.bias.grad.numpy(), "b_dec": t.ae.b_dec.grad.numpy()}
    prefixes = L.FixedPrefixes((0.25, 0.5)) if matryoshka else None
    scale = 1 / 3 if matryoshka else 1.0  # twice divided by the number of groups
    mine = L.Loss(
        {"mse": (scale, L.mse)}, (1 / 32, L.AuxK(D_IN // 2, "dictionary_learning")), prefixes=prefixes
    )
    ours, grads = case._replace(dead=case.dead & ~fired).loss_and_grads(mine, sae=sae, dead=True)
    assert ours["auxk"] > 0
    compare(ours, grads, loss, theirs)


# ---- sparsify -------------------------------------------------------------------------------------------------


def coder(case, **options):
    c = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, **options))
    put(c, encoder__weight=case.W_enc.T, encoder__bias=case.b_enc, W_dec=case.W_dec, b_dec=case.b_dec)
    return c


def coder_grads(c):
    return {
        "W_enc": c.encoder.weight.grad.numpy().T,
        "b_enc": c.encoder.bias.grad.numpy(),
        "W_dec": c.W_dec.grad.numpy(),
        "b_dec": c.b_dec.grad.numpy(),
    }


def test_sparsify_groupmax(case):
    k = 11  # of 352 latents
    c = coder(case, k=k, activation="groupmax")
    out = c(torch.from_numpy(case.x))
    assert (out.latent_acts > 0).all()
    out.fvu.backward()
    ours, grads = case.loss_and_grads(L.Loss(FVU), sae=case.sae(GroupMax(k)))
    compare(ours, grads, out.fvu.item(), coder_grads(c))


def test_sparsify_skip_transcoder(case):
    rng = np.random.default_rng(3)
    skip = 0.1 * rng.standard_normal((D_IN, D_IN), np.float32)
    y = np.maximum(case.x @ rng.standard_normal((D_IN, D_IN), np.float32), 0) / 5
    c = coder(case, k=K, transcode=True, skip_connection=True)
    put(c, W_skip=skip)
    out = c(torch.from_numpy(case.x), torch.from_numpy(y))
    assert (out.latent_acts > 0).all()
    out.fvu.backward()
    sae = case.sae(apply_b_dec_to_input=False, W_skip=mx.array(skip))
    ours, grads = case.loss_and_grads(L.Loss(FVU), sae=sae, y=y)
    theirs = coder_grads(c) | {"W_skip": c.W_skip.grad.numpy()}
    compare(ours, grads, out.fvu.item(), theirs, ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"))


def test_sparsify_multi_topk(case):
    c = coder(case, k=K, multi_topk=True)
    out = c(torch.from_numpy(case.x))
    (out.fvu + out.multi_topk_fvu / 8).backward()
    ours, grads = case.loss_and_grads(L.Loss(FVU, terms={"multi": (1 / 8, L.MultiTopK())}))
    assert ours["multi"] == pytest.approx(out.multi_topk_fvu.item(), rel=LOSS_RTOL)
    compare(ours, grads, out.fvu.item() + out.multi_topk_fvu.item() / 8, coder_grads(c), ("W_dec",))
