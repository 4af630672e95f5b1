"""Loss terms: values against dense definitions, gradients against finite differences, and where gradients may go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxsae import lm, to_dense
from mlxsae import loss as L
from mlxsae.code import DenseCode
from mlxsae.data import ContextActivations
from mlxsae.sae import (
    RULES,
    SAE,
    Activation,
    BatchTopK,
    CrossLayerTranscoder,
    Gated,
    JumpReLU,
    ReLU,
    SigmoidGated,
    TopK,
    TopKJumpReLU,
)
from mlxsae.train import LossConfig, fit
from test_rules import D_SAE, D, K, data, settings, source

DEAD = np.arange(D_SAE) % 3 == 0


def made(rule: Any, **options: Any) -> SAE:
    """With decoder rows of several norms, biases, and a rule's own parameters away from where they start."""
    sae = SAE(D, D_SAE, rule=rule, seed=0, **options)
    key = iter(mx.random.split(mx.random.key(7), 8))
    sae.decoder.weight = sae.decoder.weight * mx.random.uniform(0.5, 2, (D_SAE, 1), key=next(key))
    sae.encoder.bias = 0.1 * mx.random.normal((D_SAE,), key=next(key))
    sae.decoder.bias = 0.1 * mx.random.normal((D,), key=next(key))
    own = sae.rule.parameters()
    sae.rule.update(
        tree_map(lambda p: p + mx.random.uniform(0, 0.2, p.shape, key=mx.random.key(p.size)), own)
    )
    return sae


def forward(sae: SAE, x: mx.array, loss: L.Loss, *, dead: bool = True, step: int = 0) -> L.Forward:
    code, _, pre_acts = sae.learn(x, sae.rule.initial_state())
    scheduled = loss.scheduled(step, D_SAE)
    return L.Forward(
        sae, x, x, code, sae.decode(code, x), mx.array(DEAD) if dead else None, pre_acts, scheduled
    )


def gradient(sae: SAE, term: Any, x: mx.array, **options: Any) -> tuple[float, dict[str, np.ndarray]]:
    loss = L.Loss({}, terms={"t": (1.0, term)})
    value, grads = nn.value_and_grad(sae, lambda x: loss(forward(sae, x, loss, **options))[0])(x)
    return value.item(), {name: np.array(g) for name, g in tree_flatten(grads)}


def model_logits(y: mx.array) -> mx.array:
    return mx.tanh(y @ mx.random.normal((D, 11), key=mx.random.key(3))) * 3


def model_losses(y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model_logits(y), mx.arange(y.shape[0]) % 11)


SMOOTH = {
    "l1": (L.L1(), ReLU()),
    "l1 of slots": (L.L1(), TopK(K)),
    "l1 of rows": (L.L1(), BatchTopK(K)),
    "lp": (L.Lp(0.5), ReLU()),
    "lp of rows": (L.Lp(0.5), BatchTopK(K)),
    "lp root": (L.Lp(0.5, root=True), BatchTopK(K)),
    "tanh": (L.Tanh(2.0), ReLU()),
    "gate l1": (L.GateL1(), Gated()),
    "gate": (L.GateReconstruction(detach=False), Gated()),
    "gate relative": (L.GateReconstruction(detach=False, relative=True), Gated()),
    "gate mean": (L.GateMean(), SigmoidGated()),
    "pre-activations": (L.PreActs(), ReLU()),
    "pre-activations of all": (L.PreActs(every=True), TopK(K)),
    "multi": (L.MultiTopK(2), TopK(K)),
    "kl": (L.KL(model_logits), TopK(K)),
    "ce": (L.CrossEntropy(model_losses), BatchTopK(K)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_against_finite_differences(name: str) -> None:
    """Along random directions in the space of all parameters, small enough to change no selection."""
    term, rule = SMOOTH[name]
    sae, x = made(type(rule)(**rule.config())), mx.array(data(32))
    loss = L.Loss({}, terms={"t": (1.0, term)})
    _, grads = gradient(sae, term, x)
    assert max(np.abs(g).max() for g in grads.values()) > 0
    start = dict(tree_flatten(sae.trainable_parameters()))
    rng = np.random.default_rng(0)
    found, wanted = [], []
    for _ in range(6):
        move = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in start.items()}
        # Half of it along the gradient, so that the slope stands out of float32's noise.
        size = {n: np.linalg.norm(g) + 1e-12 for n, g in grads.items()}
        move = {n: 0.05 * m / np.linalg.norm(m) + grads[n] / max(size.values()) for n, m in move.items()}
        values = []
        for h in (2e-4, -2e-4):
            sae.update(_tree({n: p + h * mx.array(move[n]) for n, p in start.items()}))
            values.append(float(loss(forward(sae, x, loss))[0]))
        sae.update(_tree(start))
        found.append((values[0] - values[1]) / 4e-4)
        wanted.append(sum(float((grads[n] * move[n]).sum()) for n in start))
    np.testing.assert_allclose(np.median(np.array(found) / np.array(wanted)), 1, atol=0.03)


def _tree(named: dict[str, mx.array]) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(named.items()))


def test_terms_of_latents_ranked_by_decoder_norm() -> None:
    """What is compared with thresholds is a pre-activation times its decoder norm; every size is the pre-activation's own."""
    x, dead = mx.array(data(32)), mx.arange(D_SAE) < 9

    def ranked(rule: Any) -> SAE:
        sae = SAE(D, D_SAE, rule=rule, rank_by_decoder_norm=True, seed=2)
        sae.W_dec = sae.W_dec * mx.linspace(0.3, 3, D_SAE)[:, None]
        sae.b_enc = 0.1 * mx.random.normal((D_SAE,), key=mx.random.key(4))
        return sae

    def found(sae: SAE, term: Any) -> float:
        loss = L.Loss({})
        return float(term(forward(sae, x, loss)._replace(dead=dead)))

    for rule in (JumpReLU(K, initial_threshold=0.2), Gated()):
        sae = ranked(rule)
        z, norms = np.array(sae.pre_acts(x)), np.linalg.norm(np.array(sae.W_dec), axis=1)
        w_dec, b_dec = np.array(sae.W_dec), np.array(sae.b_dec)
        if isinstance(rule, Gated):
            want = np.maximum(z, 0)
            assert found(sae, L.GateL1()) == pytest.approx((want * norms).sum(axis=1).mean(), rel=1e-4)
            error = np.square(want @ w_dec + b_dec - np.array(x)).sum(axis=1).mean()
            assert found(sae, L.GateReconstruction()) == pytest.approx(error, rel=1e-4)
        else:
            fires = z * norms > 0.2
            assert found(sae, L.L0()) == pytest.approx(fires.sum(axis=1).mean(), abs=1e-6)
            short = np.maximum(0.2 - z * norms, 0) * np.array(dead)
            assert found(sae, L.PreActs()) == pytest.approx(short.sum(axis=1).mean(), rel=1e-4)
    sae = ranked(TopKJumpReLU(K, bandwidth=5.0))
    assert np.abs(gradient(sae, L.L1(), x)[1]["rule.threshold"]).max() > 0


@pytest.mark.parametrize("rule", ["relu", "topk", "batchtopk", "jumprelu"])
def test_penalties_are_those_of_dense_latents(rule: str) -> None:
    kind = RULES[rule]
    sae, x = made(kind(K) if rule in ("topk", "batchtopk") else kind()), mx.array(data(32))
    loss = L.Loss({})
    f = forward(sae, x, loss)
    acts = np.array(to_dense(f.code, D_SAE), np.float64) * np.linalg.norm(np.array(sae.W_dec), axis=1)
    for term, want in (
        (L.L1(), acts.sum(axis=1).mean()),
        (L.Lp(0.5), (np.where(acts > 0, acts, 0) ** 0.5).sum(axis=1).mean()),
        (L.Lp(2.0, root=True), np.sqrt((acts**2).sum(axis=1)).mean()),
        (L.Tanh(3.0), np.tanh(3 * acts).sum(axis=1).mean()),
    ):
        assert term(f).item() == pytest.approx(want, rel=1e-5), term


def test_l0_terms() -> None:
    sae, x = made(JumpReLU(5, bandwidth=0.05, through_input=False)), mx.array(data(64))
    f = forward(sae, x, L.Loss({}))
    fires = (np.array(to_dense(f.code, D_SAE)) > 0).sum(axis=1)
    assert L.L0()(f).item() == pytest.approx(fires.mean())
    assert L.L0Target()(f).item() == pytest.approx((fires.mean() / 5 - 1) ** 2, rel=1e-5)
    assert L.L0Target(9)(f).item() == pytest.approx((fires.mean() / 9 - 1) ** 2, rel=1e-5)
    assert L.L0Quadratic()(f).item() == pytest.approx((2 / 5 * (fires - 5.0) ** 2).mean(), rel=1e-5)
    _, grads = gradient(sae, L.L0(), x)
    z, t = np.array(sae.pre_acts(x), np.float64), np.array(sae.rule.threshold)
    near = (np.abs(z - t) < 0.025) / 0.05
    np.testing.assert_allclose(grads["rule.threshold"], -near.sum(axis=0) / 64, rtol=1e-4, atol=1e-5)
    assert not any(np.abs(g).any() for n, g in grads.items() if n != "rule.threshold")


def test_pre_acts_reach_dead_latents_below_their_threshold_alone() -> None:
    sae, x = made(JumpReLU(5)), mx.array(data(64))
    value, grads = gradient(sae, L.PreActs(), x)
    z, t = np.array(sae.pre_acts(x), np.float64), np.array(sae.rule.threshold, np.float64)
    norms = np.linalg.norm(np.array(sae.W_dec), axis=1)
    assert value == pytest.approx((np.maximum(t - z, 0) * DEAD * norms).sum(axis=1).mean(), rel=1e-5)
    below = (z < t).sum(axis=0) * DEAD
    np.testing.assert_array_equal(grads["encoder.bias"] != 0, below > 0)
    np.testing.assert_allclose(grads["encoder.bias"], -below * norms / 64, rtol=1e-4)
    assert L.PreActs()(forward(sae, x, L.Loss({}), dead=False)).item() == 0


def test_ghost_gradients_against_the_equations() -> None:
    sae, x = made(TopK(K)), mx.array(data(32))
    value, grads = gradient(sae, L.GhostGradients(), x)
    f = forward(sae, x, L.Loss({}))
    z, w = np.array(sae.pre_acts(x), np.float64)[:, DEAD], np.array(sae.W_dec, np.float64)[DEAD]
    r = np.array(x - f.y_hat, np.float64)
    ghosts = np.exp(z)
    out = ghosts @ w
    scale = np.linalg.norm(r, axis=1, keepdims=True) / (1e-6 + 2 * np.linalg.norm(out, axis=1, keepdims=True))
    each = (out * scale - r) ** 2
    factor = r**2 / (each + 1e-6)
    assert value == pytest.approx((each * factor).mean(), rel=1e-4)
    assert value == pytest.approx((r**2).mean(), rel=0.05)  # as large as the loss it stands beside
    d_out = 2 * (out * scale - r) * factor * scale / r.size
    d_z, d_w = (d_out @ w.T) * ghosts, ghosts.T @ d_out
    np.testing.assert_allclose(grads["decoder.weight"][DEAD], d_w, rtol=2e-3, atol=1e-4 * np.abs(d_w).max())
    np.testing.assert_allclose(grads["encoder.bias"][DEAD], d_z.sum(axis=0), rtol=2e-3, atol=1e-6)
    for name in ("encoder.weight", "encoder.bias", "decoder.weight"):
        assert not grads[name][~DEAD].any(), name
    assert L.GhostGradients()(forward(sae, x, L.Loss({}), dead=False)).item() == 0
    none = forward(sae, x, L.Loss({}))._replace(dead=mx.zeros(D_SAE, mx.bool_))
    assert L.GhostGradients()(none).item() == 0


def test_ghost_gradients_of_large_pre_activations() -> None:
    """Raw activations of some models have norms in the thousands: an exponential of them is over float32's range."""
    sae, x = made(TopK(K)), mx.array(data(32))
    sae.encoder.weight = 4000 * sae.encoder.weight
    assert sae.pre_acts(x).max().item() > 200
    value, grads = gradient(sae, L.GhostGradients(), x)
    f = forward(sae, x, L.Loss({}))
    assert value == pytest.approx(mx.square(x - f.y_hat).mean().item(), rel=0.05)
    assert all(np.isfinite(g).all() for g in grads.values())
    assert np.abs(grads["decoder.weight"][DEAD]).max() > 0
    clt = CrossLayerTranscoder(8, 2, D_SAE, k=K)
    code = clt.learn(x, {}).code
    with pytest.raises(ValueError, match="the SAE must have one decoder but is a CrossLayerTranscoder"):
        L.GhostGradients()(L.Forward(clt, x, x, code, clt.decode(code), mx.ones(2 * D_SAE, mx.bool_)))


def test_kl_over_tokens_that_the_model_rules_out() -> None:
    """Logits of minus infinity, on one side or on both."""
    out = np.array([0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], bool)

    def masked(y: mx.array) -> mx.array:
        return mx.where(mx.array(out), -mx.inf, model_logits(y))

    sae, x = made(TopK(K)), mx.array(data(32))
    f = forward(sae, x, L.Loss({}))
    p, q = (np.array(mx.softmax(masked(a), axis=-1), np.float64)[:, ~out] for a in (x, f.y_hat))
    value, grads = gradient(sae, L.KL(masked), x)
    assert value == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-4)
    assert all(np.isfinite(g).all() for g in grads.values())
    assert np.abs(grads["decoder.weight"]).max() > 0
    assert np.isnan(L.KL(lambda y: model_logits(y) * float("nan"))(f).item())


@pytest.mark.parametrize("rule", [TopK(K), Gated()])
def test_terms_of_an_sae_that_normalises_each_token(rule: Any) -> None:
    """What its latents write counts times the token's deviation, as in its reconstruction."""
    sae = made(rule)
    sae.normalize_activations = "layer_norm"
    x = data(32).astype(np.float64) * np.linspace(1, 9, 32)[:, None] + 2
    f = forward(sae, mx.array(x.astype(np.float32)), L.Loss({}))
    mean, std = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
    w_enc, w_dec, b_enc, b_dec = (
        np.array(a, np.float64) for a in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    pre_acts = ((x - mean) / (std + 1e-5) - b_dec) @ w_enc + b_enc

    def decoded(latents: np.ndarray) -> np.ndarray:
        return (latents @ w_dec + b_dec) * std + mean

    latents = np.array(sae.to_dense(f.code), np.float64)
    np.testing.assert_allclose(np.array(f.y_hat), decoded(latents), atol=1e-3)
    nested = L.Loss({"mse": (1.0, L.mse)}, prefixes=L.FixedPrefixes((4, D_SAE // 2)))
    errors = [
        np.square(x - decoded(latents * (np.arange(D_SAE) < width))).sum(axis=1).mean()
        for width in (4, D_SAE // 2, D_SAE)
    ]
    total = nested(f._replace(scheduled=nested.scheduled(0, D_SAE)))[0]
    assert total.item() == pytest.approx(np.mean(errors), rel=1e-4)
    dead = np.maximum(pre_acts, 0) * DEAD
    rest = x - decoded(latents)
    aux = np.square(dead @ w_dec * std - rest).sum() / np.square(rest - rest.mean(axis=0)).sum()
    assert L.AuxK(D_SAE)(f).item() == pytest.approx(aux, rel=1e-4)
    if isinstance(rule, Gated):
        gate = np.square(x - decoded(np.maximum(pre_acts, 0))).sum(axis=1).mean()
        assert L.GateReconstruction()(f).item() == pytest.approx(gate, rel=1e-4)


def test_multi_topk_follows_an_annealed_k() -> None:
    """Of twice the k of the step, not of the k that the rule ends with."""
    sae, x = made(TopK(K)), mx.array(data(32))
    whole = made(TopK(2 * K))
    annealed = L.MultiTopK(2)(forward(sae, x, L.Loss({}))._replace(k=2 * K))
    assert annealed.item() == pytest.approx(L.MultiTopK(2)(forward(whole, x, L.Loss({}))).item(), rel=1e-6)
    seen = []

    def watch(f: L.Forward) -> mx.array:
        seen.append(f.k)
        return mx.array(0.0)

    loss = L.Loss({"fvu": (1.0, L.fvu)}, terms={"watch": (1.0, watch)})
    fit(SAE(D, D_SAE, k=K, seed=0), source(), settings(4, k_start=8, k_warmup=2), loss=loss)
    assert seen == [8, 6, None, None]


@pytest.mark.parametrize("factor", [1, 3, D_SAE])
def test_multi_topk_ranks_as_the_sae_does(factor: int) -> None:
    """By size in the output, where that is what latents compete by: the selection of the rule is among it."""
    sae, x = made(TopK(K), rank_by_decoder_norm=True), data(32).astype(np.float64)
    w_enc, w_dec, b_enc, b_dec = (
        np.array(a, np.float64) for a in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    pre_acts = (x - b_dec) @ w_enc + b_enc
    sizes = pre_acts * np.linalg.norm(w_dec, axis=1)
    least = np.sort(sizes, axis=1)[:, -min(factor * K, D_SAE)]
    acts = np.where(sizes >= least[:, None], np.maximum(pre_acts, 0), 0)
    error = np.square(x - acts @ w_dec - b_dec).sum()
    f = forward(sae, mx.array(x.astype(np.float32)), L.Loss({}))
    assert L.MultiTopK(factor)(f).item() == pytest.approx(
        error / np.square(x - x.mean(axis=0)).sum(), rel=1e-5
    )


def test_penalties_of_negative_latents() -> None:
    """An activation of one's own may give them: a norm counts their size and cannot fall below 0."""
    sae, x = made(Activation(mx.tanh)), mx.array(data(32))
    f = forward(sae, x, L.Loss({}))
    acts = np.abs(np.array(f.code.values)) * np.linalg.norm(np.array(sae.W_dec), axis=1)
    assert L.L1()(f).item() == pytest.approx(acts.sum(axis=1).mean(), rel=1e-5)
    assert L.Tanh(3.0)(f).item() == pytest.approx(np.tanh(3 * acts).sum(axis=1).mean(), rel=1e-5)
    assert L.Lp(0.5)(f).item() == pytest.approx((acts**0.5).sum(axis=1).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.Lp(-1.0), r"\[Lp\] p must be positive but got -1"),
        (lambda: L.Lp(like=0.0), r"\[Lp\] like must be positive but got 0"),
        (lambda: L.Lp(lambda step: 1 - step).scheduled(3), r"\[Lp\] p of step 3 must be positive but got -2"),
        (lambda: L.Tanh(float("nan")), r"\[Tanh\] c must be positive but got nan"),
        (lambda: L.L0Target(0), r"\[L0Target\] k must be positive but got 0"),
        (lambda: L.L0Quadratic(-3), r"\[L0Quadratic\] k must be positive but got -3"),
        (lambda: L.MultiTopK(0), r"\[MultiTopK\] factor must be a positive whole number but got 0"),
        (lambda: L.MultiTopK(1.5), r"\[MultiTopK\] factor must be a positive whole number but got 1.5"),
    ],
)
def test_terms_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_gate_learns_from_its_terms_alone_and_the_decoder_not_from_the_gate() -> None:
    sae, x = made(Gated()), mx.array(data(32))
    _, grads = gradient(sae, lambda f: mx.square(f.y - f.y_hat).sum(), x)
    assert not grads["encoder.bias"].any()  # the main loss cannot move a gate
    assert grads["rule.r_mag"].any()
    assert grads["rule.b_mag"].any()
    _, grads = gradient(sae, L.GateReconstruction(), x)
    assert grads["encoder.bias"].any()
    assert not grads["decoder.weight"].any()
    assert not grads["rule.b_mag"].any()


def test_kl_is_zero_at_a_perfect_reconstruction_only() -> None:
    sae, x = made(TopK(K)), mx.array(data(32))
    f = forward(sae, x, L.Loss({}))
    assert L.KL(model_logits)(f._replace(y_hat=x)).item() == pytest.approx(0, abs=1e-6)
    assert L.KL(model_logits)(f).item() > 0.01
    p, q = (np.array(mx.softmax(model_logits(a), axis=-1), np.float64) for a in (x, f.y_hat))
    assert L.KL(model_logits)(f).item() == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-4)
    assert L.CrossEntropy(model_losses)(f).item() == pytest.approx(model_losses(f.y_hat).mean().item())


def test_end_to_end_training_serves_the_model() -> None:
    """Trained by KL alone, the SAE disturbs the model less than one trained by reconstruction for as long."""
    held_out = mx.array(data(500, seed=7))
    found = []
    for loss in (L.Loss({}, terms={"kl": (1.0, L.KL(model_logits))}), L.Loss({"fvu": (1.0, L.fvu)})):
        sae = SAE(D, D_SAE, k=2, seed=0)
        fit(sae, source(), settings(300, normalize="none"), loss=loss)
        code = sae.encode(held_out)
        found.append(L.KL(model_logits)(L.Forward(sae, held_out, held_out, code, sae.decode(code))).item())
    assert found[0] < found[1]


def test_the_model_goes_on_from_other_rows() -> None:
    """With its own rows the model predicts what it did; with others at one place only later predictions change."""
    model = lm.load("tiny")
    tokens, valid = next(
        iter(lm.token_batches(model, lm.tiny.texts(9, seed=0), context_size=24, batch_size=3))
    )
    contexts = ContextActivations(model, model.hook_point("resid", layer=1), lambda: iter([(tokens, valid)]))
    rows, same, places = contexts.next_batch()
    assert contexts.next_batch() is None
    assert mx.array_equal(same, tokens)
    logits = lm.logits_from(model, "blocks.1.hook_resid_post")
    plain = model(tokens).reshape(-1, logits(rows, tokens, places).shape[-1])[places]
    np.testing.assert_allclose(logits(rows, tokens, places), plain, atol=1e-4)
    losses = np.array(lm.losses_from(model, "blocks.1.hook_resid_post")(rows, tokens, places))
    unsigned = lm.losses_from(model, "blocks.1.hook_resid_post")(rows, tokens, places.astype(mx.uint32))
    assert np.array_equal(np.array(unsigned), losses)
    each, mask = np.array(lm.token_losses(model, tokens)), np.array(valid)
    counts = mask[:, 1:] & mask[:, :-1]
    assert losses.mean() == pytest.approx(each[counts].mean(), rel=1e-4)
    moved = np.array(logits(mx.where(mx.arange(len(rows))[:, None] == 5, -rows, rows), tokens, places))
    changed = np.abs(moved - np.array(plain)).max(axis=1) > 1e-3
    context = np.array(places) // tokens.shape[1]
    assert changed[5]
    assert not changed[:5].any()
    assert not changed[context != context[5]].any()


def test_an_interrupt_does_not_end_the_contexts() -> None:
    model = lm.load("tiny")
    batches = list(lm.token_batches(model, lm.tiny.texts(9, seed=0), context_size=24, batch_size=3))
    point = model.hook_point("resid", layer=1)

    def all_of(contexts: ContextActivations) -> list[np.ndarray]:
        return [np.array(rows) for rows, _, _ in iter(contexts.next_batch, None)]

    left = [2]

    def texts() -> Iterator[lm.TokenBatch]:
        for batch in batches:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            yield batch

    contexts = ContextActivations(model, point, texts)
    first = np.array(contexts.next_batch()[0])
    with pytest.raises(KeyboardInterrupt):
        contexts.next_batch()
    expected = all_of(ContextActivations(model, point, lambda: batches))
    assert len(expected) > 2
    found = [first, *all_of(contexts)]
    assert len(found) == len(expected)
    assert all(map(np.array_equal, found, expected))


def test_schedules_reach_the_terms() -> None:
    p = L.anneal(1.0, 0.2, 10, 50)
    assert [p(s) for s in (0, 10, 30, 50, 99)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    sae, x = made(ReLU()), mx.array(data(32))
    loss = L.Loss({}, terms={"lp": (lambda step: 0.1 * step, L.Lp(p))})
    for step in (5, 30):
        total, values = loss(forward(sae, x, loss, step=step))
        fixed = L.Lp(p(step))(forward(sae, x, loss))
        assert values["lp"].item() == pytest.approx(fixed.item(), rel=1e-6)
        assert total.item() == pytest.approx(0.1 * step * fixed.item(), rel=1e-5)
    history = fit(
        SAE(D, D_SAE, rule=ReLU(), seed=0),
        source(),
        settings(20, log_every=1, loss=LossConfig(terms={"l1": 0.01}, warmup=0.5, auxk=None)),
    ).history
    weights = [(r["loss"] - r["fvu"]) / r["l1"] for r in history]
    np.testing.assert_allclose(weights, [0.01 * min(1, (s + 1) / 10) for s in range(20)], rtol=2e-2)
    annealed = LossConfig(terms={"lp": 1e-3}, warmup=0.5, p_end=0.2).build(sae, 20)
    powers = [annealed.scheduled(step, D_SAE)["lp.p"].item() for step in (0, 10, 15, 20)]
    np.testing.assert_allclose(powers, [1, 1, 0.6, 0.2], rtol=1e-6)
    f = forward(sae, x, annealed, step=19)
    assert annealed(f)[1]["lp"].item() == pytest.approx(L.L1()(f).item(), rel=1e-5)  # at the size of L1
    with pytest.raises(ValueError, match="terms must have lp where p_end is given"):
        LossConfig(p_end=0.2)
    with pytest.raises(ValueError, match=r"\[anneal\] begin must be in \[0, finish\)"):
        L.anneal(1, 0, 5, 5)


def test_terms_of_one_loss_are_annealed_each_by_its_own_schedule() -> None:
    powers = {
        "lp": L.anneal(1, 0.2, 0, 20),
        "fast": L.anneal(1, 0.5, 0, 10),
        "slow": L.anneal(1, 0.5, 10, 40),
    }
    sae, x = made(ReLU()), mx.array(data(32))
    loss = L.Loss({}, terms={name: (1e-3, L.Lp(p)) for name, p in powers.items()})
    for step in (0, 7, 30):
        values = loss(forward(sae, x, loss, step=step))[1]
        for name, p in powers.items():
            assert values[name].item() == pytest.approx(
                L.Lp(p(step))(forward(sae, x, L.Loss({}))).item(), rel=1e-6
            )
    whole = L.Loss({"fvu": (1.0, L.fvu)}, terms=loss.terms)
    last = fit(SAE(D, D_SAE, rule=ReLU(), seed=0), source(), settings(20, log_every=1), loss=whole).history[
        -1
    ]
    assert len({last["lp"], last["fast"], last["slow"]}) == 3


def test_lp_keeps_the_size_of_l1() -> None:
    sae, x = made(ReLU()), mx.array(data(32))
    f = forward(sae, x, L.Loss({}))
    assert L.Lp(0.4, like=1)(f).item() == pytest.approx(L.L1()(f).item(), rel=1e-5)
    ratio = L.L1()(f).item() / L.Lp(0.4)(f).item()
    assert ratio != pytest.approx(1, rel=0.1)
    (_, a), (_, b) = gradient(sae, L.Lp(0.4, like=1), x), gradient(sae, L.Lp(0.4), x)
    for name in a:
        np.testing.assert_allclose(a[name], ratio * b[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("term", "rule", "message"),
    [
        (L.L0(), TopK(K), r"\[l0\] the rule must have a learned threshold"),
        (L.L0Target(), JumpReLU(), r"\[l0\] k must be given by the term or the rule"),
        (L.GateL1(), TopK(K), r"\[gate\] the rule must be gated"),
        (L.MultiTopK(), ReLU(), r"\[MultiTopK\] the rule must have a k but is ReLU"),
    ],
)
def test_terms_that_do_not_fit_the_rule(term: Any, rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term(forward(SAE(D, D_SAE, rule=rule, seed=0), mx.array(data(4)), L.Loss({})))


# ---- AuxK: the cases that a definition must settle, on four latents by hand ------------------------------------


def by_hand(pre_acts: list[float], dead: list[bool], k_aux: int, preset: str = "saelens") -> tuple[Any, Any]:
    """One token of width 2, x = (1, 1), encoder rows that give these pre-activations, decoder rows at hand."""
    w_dec = mx.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    w_enc = mx.array([[p, 0.0] for p in pre_acts])
    sae = SAE.from_weights(w_enc.T, w_dec, k=1, apply_b_dec_to_input=False)
    x, y_hat = mx.array([[1.0, 1.0]]), mx.array([[0.5, 0.0]])
    term = L.AuxK(k_aux, preset)

    def of(_: mx.array) -> mx.array:
        code = DenseCode(mx.zeros((1, 4)))
        return term(L.Forward(sae, x, x, code, y_hat + 0 * sae.decoder.bias, mx.array(dead)))

    value, grads = nn.value_and_grad(sae, of)(x)
    return value.item(), {n: np.array(g) for n, g in tree_flatten(grads)}


def test_auxk_value() -> None:
    """residual (0.5, 1); of dead 1 and 2 (pre-activations 0.5, 2) the largest is 2: it says 2 (0.6, 0.8)."""
    value, _ = by_hand([9, 0.5, 2, 9], [False, True, True, False], 1)
    assert value == pytest.approx((1.2 - 0.5) ** 2 + (1.6 - 1) ** 2)
    value, _ = by_hand([9, 0.5, 2, 9], [False, True, True, False], 2)
    assert value == pytest.approx((1.2 - 0.5) ** 2 + (1.6 + 0.5 - 1) ** 2)


def test_auxk_takes_no_more_than_are_dead() -> None:
    """k_aux over the number of dead latents: all dead ones, never a living one; scaled down by their share of k_aux."""
    value, grads = by_hand([9, 0.5, 2, 9], [False, True, True, False], 4)
    assert value == pytest.approx(2 / 4 * ((1.2 - 0.5) ** 2 + (1.6 + 0.5 - 1) ** 2))
    assert not grads["encoder.weight"][[0, 3]].any()
    unscaled, _ = by_hand([9, 0.5, 2, 9], [False, True, True, False], 4, "dictionary_learning")
    assert unscaled == 0 or np.isfinite(unscaled)  # one token has no variance: the denominator is 1


def test_auxk_gradient_is_at_the_selected_dead_latents_only() -> None:
    _, grads = by_hand([9, 0.5, 2, 9], [False, True, True, False], 1)
    error = np.array([1.2 - 0.5, 1.6 - 1])
    want = np.zeros((4, 2))
    want[2] = 2 * error * 2  # value 2
    np.testing.assert_allclose(grads["decoder.weight"], want, rtol=1e-5)
    d_act = 2 * error @ [0.6, 0.8]
    want = np.zeros((4, 2))
    want[2] = d_act * np.array([1.0, 1.0])
    np.testing.assert_allclose(grads["encoder.weight"], want, rtol=1e-5)
    np.testing.assert_allclose(grads["encoder.bias"], [0, 0, d_act, 0], rtol=1e-5)


def test_auxk_does_not_pull_at_what_made_the_residual() -> None:
    _, grads = by_hand([9, 0.5, 2, 9], [False, True, True, False], 1)
    assert not grads["decoder.bias"].any()
    _, grads = by_hand([9, 0.5, 2, 9], [False, True, True, False], 1, "openai")
    assert grads["decoder.bias"].any()  # of the decoder, as documented, not of the residual


@pytest.mark.parametrize("preset", sorted(L.AUXK_PRESETS))
def test_auxk_without_dead_latents(preset: str) -> None:
    value, grads = by_hand([9, 0.5, 2, 9], [False] * 4, 2, preset)
    assert value == 0
    assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize("preset", sorted(L.AUXK_PRESETS))
def test_auxk_of_negative_pre_activations(preset: str) -> None:
    """Where dead pre-activations are negative, relu silences them; SAELens' preset keeps value and gradient."""
    value, grads = by_hand([9, -1, -2, 9], [False, True, True, False], 1, preset)
    signed = L.AUXK_PRESETS[preset].signed
    assert grads["encoder.weight"].any() == signed
    if signed:
        assert value == pytest.approx(0.5**2 + (-1 - 1) ** 2)
        np.testing.assert_array_equal(grads["encoder.weight"].any(axis=1), [False, True, False, False])
