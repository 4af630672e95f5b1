"""Every architecture by its definition, and through the trainer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxsae import io, to_dense
from mlxsae import loss as L
from mlxsae.data import ArraySource
from mlxsae.metrics import evaluate
from mlxsae.sae import (
    RULES,
    SAE,
    Activation,
    BatchTopK,
    Crosscoder,
    CrossLayerTranscoder,
    Gated,
    GroupMax,
    Hierarchical,
    HierarchicalSAE,
    JumpReLU,
    ReLU,
    SigmoidGated,
    TopK,
    TopKJumpReLU,
)
from mlxsae.train import (
    CrossLayerConfig,
    LossConfig,
    SAEConfig,
    TranscoderConfig,
    directions,
    fit,
    initialize,
    initialize_decoder_from_pca,
    initialize_encoder_as_transpose,
)
from mlxsae.train.engine import FusedEngine
from test_losses import made
from test_rules import D_SAE, D, K, data, settings, source, weights

X = data(40)


def relu(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0)


def as64(*arrays: mx.array) -> list[np.ndarray]:
    return [np.array(a, np.float64) for a in arrays]


def definition(sae: SAE) -> np.ndarray:
    """Latents of X in float64, from the equations."""
    w, b, b_dec = as64(sae.W_enc, sae.b_enc, sae.b_dec)
    inner = X - b_dec if sae.apply_b_dec_to_input else X.astype(np.float64)
    z, rule = inner @ w + b, sae.rule
    if isinstance(rule, ReLU):
        return relu(z)
    if isinstance(rule, Gated):
        r, m = as64(rule.r_mag, rule.b_mag)
        return (z > 0) * relu(inner @ (w * np.exp(r)) + m)
    if isinstance(rule, SigmoidGated):
        g, c = as64(rule.gate_weight, rule.gate_bias)
        openness = 1 / (1 + np.exp(-(inner @ g.T + c)))
        return np.where(openness > rule.cut, relu(z) * openness, 0)
    if isinstance(rule, GroupMax):
        groups = z.reshape(len(z), rule.k, -1)
        return relu(np.where(groups == groups.max(axis=-1, keepdims=True), groups, 0).reshape(z.shape))
    if isinstance(rule, TopKJumpReLU):
        kept = z >= np.sort(z, axis=1)[:, -rule.k, None]
        return np.where(kept & (z > np.array(rule.threshold)), relu(z), 0)
    if isinstance(rule, Activation):
        return np.log1p(np.exp(z)) - 0.5
    raise AssertionError(rule)


@pytest.mark.parametrize(
    "rule",
    [
        ReLU(),
        Gated(),
        SigmoidGated(),
        SigmoidGated(cut=0),
        GroupMax(6),
        TopKJumpReLU(6),
        Activation(lambda z: nn.softplus(z) - 0.5),
    ],
    ids=lambda r: type(r).__name__,
)
def test_training_and_use_give_the_latents_of_the_definition(rule: Any) -> None:
    sae, x = made(rule), mx.array(X)
    want = definition(sae)
    assert 0 < (want > 0).mean() <= 1
    learned = to_dense(sae.learn(x, {}).code, D_SAE)
    np.testing.assert_allclose(learned, want, atol=2e-5)
    np.testing.assert_allclose(to_dense(sae.encode(x), D_SAE), want, atol=2e-5)
    np.testing.assert_allclose(sae(x), want @ as64(sae.W_dec)[0] + as64(sae.b_dec)[0], atol=1e-4)


def test_group_max_has_the_gradient_of_what_it_chose_and_trains_fused() -> None:
    x = mx.array(X)
    for sae in (made(GroupMax(6)),):
        chosen = mx.array(definition(sae) > 0)

        def ours(x: mx.array, sae: SAE = sae) -> mx.array:
            return mx.square(sae.decode(sae.learn(x, {}).code) - x).sum()

        def dense(x: mx.array, sae: SAE = sae, chosen: mx.array = chosen) -> mx.array:
            acts = mx.where(chosen, sae.pre_acts(x), 0)
            return mx.square(acts @ sae.decoder.weight + sae.decoder.bias - x).sum()

        for (name, a), (_, b) in zip(
            *(sorted(tree_flatten(nn.value_and_grad(sae, f)(x)[1])) for f in (ours, dense)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(np.array(b)).max(), err_msg=name)
    trained = []
    for engine in ("fused", "autodiff"):
        sae = SAE(D, D_SAE, rule=GroupMax(6), seed=0)
        fit(sae, source(), settings(30, engine=engine))
        trained.append(weights(sae))
    for name, a in trained[0].items():
        np.testing.assert_allclose(a, trained[1][name], atol=5e-5, err_msg=name)


def test_topk_jump_relu_threshold_gradient() -> None:
    sae, x = made(TopKJumpReLU(6, bandwidth=0.3)), mx.array(X)
    g = np.random.default_rng(0).normal(size=(len(X), D_SAE))
    _, grads = nn.value_and_grad(
        sae, lambda x: (to_dense(sae.learn(x, {}).code, D_SAE) * mx.array(g.astype(np.float32))).sum()
    )(x)
    w, b, b_dec, t = as64(sae.W_enc, sae.b_enc, sae.b_dec, sae.rule.threshold)
    z = (X - b_dec) @ w + b
    kept = (z >= np.sort(z, axis=1)[:, -6, None]) & (z > 0)
    want = -(g * kept * t * (np.abs(z - t) < 0.15) / 0.3).sum(axis=0)
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(grads["rule"]["threshold"], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(RULES))
def test_every_architecture_learns_from_its_configuration(architecture: str) -> None:
    """With the loss terms it takes by default, from the seeded start, on the default engine."""
    config = SAEConfig(
        architecture=architecture, d_sae=D_SAE, k=K, train=settings(500, loss=LossConfig(dead_after=640))
    )
    sae = config.build(D)
    held_out = mx.array(data(1000, seed=7))
    before = evaluate(sae, [held_out])["fvu"]
    result = fit(sae, source(), config.train)
    got = evaluate(sae, [held_out])
    assert got["fvu"] < 0.35 * before
    assert got["fvu"] < 0.3
    fused = architecture in ("topk", "batchtopk", "groupmax")
    assert result.sae.metadata["training"]["engine"] == ("fused" if fused else "autodiff")


def test_a_users_module_as_activation_trains() -> None:
    class Leak(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = mx.array(0.3)

        def __call__(self, z: mx.array) -> mx.array:
            return mx.maximum(z, 0) * self.slope

    sae = SAE(D, D_SAE, rule=Activation(Leak()), seed=0)
    fit(sae, source(), settings(60))
    assert sae.rule.fn.slope.item() != pytest.approx(0.3)
    assert evaluate(sae, [mx.array(X)])["fvu"] < 0.2


def test_activations_that_cannot_be() -> None:
    with pytest.raises(TypeError, match="fn must be a function of pre-activations but got 'relu'"):
        Activation("relu")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"fn must keep the shape \(40, 48\) of pre-activations but gave \(40, 5\)"
    ):
        SAE(D, D_SAE, rule=Activation(lambda z: z[:, :5])).encode(mx.array(X))


def test_tied_weights_are_one_parameter() -> None:
    sae = SAE(D, D_SAE, k=K, tied=True, seed=0)
    assert sorted(n for n, _ in tree_flatten(sae.parameters())) == [
        "decoder.bias",
        "encoder.bias",
        "encoder.weight",
    ]
    x = mx.array(X)

    def tied(x: mx.array) -> mx.array:
        return mx.square(sae(x) - x).sum()

    free = SAE.from_weights(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, k=K)
    (_, a), (_, b) = (
        nn.value_and_grad(m, f)(x) for m, f in ((sae, tied), (free, lambda x: mx.square(free(x) - x).sum()))
    )
    np.testing.assert_allclose(
        a["encoder"]["weight"], b["encoder"]["weight"] + b["decoder"]["weight"], rtol=1e-3, atol=1e-3
    )
    result = fit(sae, source(), settings(300))
    assert result.sae.metadata["training"]["engine"] == "autodiff"
    np.testing.assert_array_equal(sae.W_dec, sae.W_enc.T)
    assert evaluate(sae, [x])["fvu"] < 0.4
    with pytest.raises(ValueError, match=r"\[SAE\] tied must be False for a transcoder"):
        SAE(D, D_SAE, k=K, d_out=5, tied=True)


def test_transcoder_with_skip() -> None:
    """Target: a linear map and something sparse. The skip takes the former, and both fold the data's scales."""
    rng = np.random.default_rng(1)
    x = 3 * data(6000)
    y = (x @ rng.normal(size=(D, 5)) + 4 * relu(x @ rng.normal(size=(D, 5)) - 2)).astype(np.float32)
    found = {}
    for skip in (False, True):
        coder = SAE(D, D_SAE, k=2, d_out=5, skip=skip, seed=0)
        result = fit(coder, ArraySource(x, y, batch_size=64, seed=0), settings(500))
        found[skip] = evaluate(coder, [(mx.array(x[:1000]), mx.array(y[:1000]))])["fvu"]
        if skip:
            assert result.history[-1]["fvu"] == pytest.approx(found[True], rel=0.5)
            assert coder.W_skip.shape == (5, D)
            code = coder.encode(mx.array(x[:3]))
            want = coder.decoder(code) + mx.array(x[:3]) @ coder.W_skip.T
            np.testing.assert_allclose(coder(mx.array(x[:3])), want, rtol=1e-5)
            with pytest.raises(ValueError, match=r"\[SAE\] x must be given to decode, for the skip"):
                coder.decode(code)
    assert found[True] < 0.7 * found[False]
    nested = settings(5, loss=LossConfig(prefixes=(0.25,), auxk=None))
    assert fit(coder, ArraySource(x, y, batch_size=64), nested).history[-1]["prefixes"] > 0


# ---- hierarchical ---------------------------------------------------------------------------------------------


def test_hierarchical_by_its_definition() -> None:
    sae, x = HierarchicalSAE(D, 10, 38, k_coarse=2, k_fine=3, seed=0), mx.array(X)
    sae.encoder.bias = 0.1 * mx.random.normal((48,), key=mx.random.key(0))
    code = sae.encode(x)
    assert code.values.shape == (40, 5)
    coarse = SAE.from_weights(sae.W_enc[:, :10], sae.W_dec[:10], sae.b_enc[:10], sae.b_dec, k=2)
    left = x - coarse(x)
    fine = SAE.from_weights(sae.W_enc[:, 10:], sae.W_dec[10:], sae.b_enc[10:], k=3)
    want = np.concatenate([to_dense(coarse.encode(x), 10), to_dense(fine.encode(left), 38)], axis=1)
    np.testing.assert_allclose(to_dense(code, 48), want, atol=1e-5)
    np.testing.assert_allclose(sae(x), coarse(x) + fine(left), atol=1e-5)
    assert sae(x.reshape(4, 10, D)).shape == (4, 10, D)


@pytest.mark.parametrize("rules", [dict(k_coarse=2, k_fine=2), dict(coarse=ReLU(), fine=Gated())])
def test_hierarchical_learns(rules: dict) -> None:
    sae = HierarchicalSAE(D, 16, 32, **rules, seed=0)
    result = fit(sae, source(), settings(300, loss=LossConfig(auxk=None, prefixes=(16,))))
    assert result.sae.metadata["training"]["engine"] == "autodiff"
    assert evaluate(sae, [mx.array(X)])["fvu"] < 0.3
    assert result.history[-1]["prefixes"] >= result.history[-1]["fvu"]


def test_a_hierarchy_by_configuration_round_trips_through_json_and_files(tmp_path: Path) -> None:
    made = SAEConfig(d_sae=48, architecture="hierarchical", k=8, rule={"d_coarse": 0.25}, train=settings(20))
    assert SAEConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    sae, x = made.build(D), mx.array(X)
    assert isinstance(sae, HierarchicalSAE)
    assert sae.rule.config() == {"k": 8, "k_coarse": 2, "d_coarse": 12}
    fit(sae, source(), made.train)
    code = np.array(to_dense(sae.encode(x), 48)) > 0
    assert code[:, :12].sum(axis=1).max() <= 2
    assert code[:, 12:].sum(axis=1).max() <= 6
    io.save(sae, tmp_path)
    again = io.load(tmp_path)
    assert isinstance(again, HierarchicalSAE)
    assert again.rule.config() == sae.rule.config()
    np.testing.assert_array_equal(again(x), sae(x))
    assert repr(again.rule) == "Hierarchical(k=8, k_coarse=2, d_coarse=12)"
    tied = replace(made, tied=True).build(D)
    fit(tied, source(), made.train)
    np.testing.assert_array_equal(tied.W_dec, tied.W_enc.T)


def test_both_levels_of_a_hierarchy_are_annealed() -> None:
    made = SAEConfig(d_sae=48, architecture="hierarchical", k=8, rule={"d_coarse": 16})
    rule = made.build(D).rule.with_k(24)
    assert (rule.k, rule.coarse.k, rule.fine.k) == (24, 6, 18)
    assert made.build(D).rule.with_k(2).coarse.k == 1
    train = settings(8, k_start=24, k_warmup=4, log_every=1, loss=LossConfig(auxk=None))
    l0 = [record["l0"] for record in fit(made.build(D), source(), train).history]
    assert l0 == pytest.approx([24, 20, 16, 12, 8, 8, 8, 8], rel=0.2)  # not all of the largest are positive


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hierarchical(1), r"k must be over k_coarse but got k=1 with k_coarse=1"),
        (lambda: Hierarchical(8, k_coarse=8), r"k must be over k_coarse but got k=8 with k_coarse=8"),
        (lambda: Hierarchical(8, d_coarse=2.5), r"d_coarse must be a positive whole number or a share .* 2.5"),
        (lambda: Hierarchical(8, d_coarse=48).prepare(D, 48), r"d_coarse must be below d_sae but got d_coarse=48"),
        (lambda: Hierarchical(8).prepare(D, 8), r"k_coarse must be in \(0, d_coarse\] but got k_coarse=2 with d_coarse=1"),
        (lambda: CrossLayerTranscoder(D, 2, 48, rule=Hierarchical(8)), r"but is in a CrossLayerTranscoder"),
        (lambda: SAE(D, 48, rule=Hierarchical(8)), r"Hierarchical must be in a HierarchicalSAE but is in a SAE"),
        (lambda: HierarchicalSAE(D, 9, 9, coarse=BatchTopK(2), fine=TopK(2)), r"must carry no state but BatchTopK"),
        (lambda: TranscoderConfig(architecture="hierarchical"), r"architecture must be a rule that a transcoder can"),
        (lambda: SigmoidGated(cut=1.0), r"\[SigmoidGated\] cut must be in \[0, 1\) but got 1.0"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_closed_sigmoid_gate_learns_and_what_is_behind_it_does_not() -> None:
    """The gradient of f = relu(m) g [g > cut]: with m and g free where the gate is open, of g alone where it is closed."""
    sae = made(SigmoidGated())
    w = mx.random.normal((len(X), D_SAE), key=mx.random.key(3))

    def of(sae: SAE) -> mx.array:
        return (sae.learn(mx.array(X), {}).code.values * w).sum()

    _, grads = nn.value_and_grad(sae, of)(sae)
    inner = X - np.array(sae.b_dec, np.float64) if sae.apply_b_dec_to_input else X.astype(np.float64)
    m = inner @ as64(sae.W_enc)[0] + as64(sae.b_enc)[0]
    g = 1 / (1 + np.exp(-(inner @ as64(sae.rule.gate_weight)[0].T + as64(sae.rule.gate_bias)[0])))
    up = np.array(w, np.float64)
    assert 0.1 < (g > 0.5).mean() < 0.9
    np.testing.assert_allclose(
        grads["rule"]["gate_bias"], (up * relu(m) * g * (1 - g)).sum(axis=0), rtol=1e-3, atol=1e-3
    )
    want = (up * (m > 0) * (g > 0.5) * g).sum(axis=0)
    np.testing.assert_allclose(grads["encoder"]["bias"], want, rtol=1e-3, atol=1e-3)


def test_bad_hierarchies() -> None:
    with pytest.raises(ValueError, match=r"give either k_coarse or coarse"):
        HierarchicalSAE(D, 10, 38, k_fine=3)
    with pytest.raises(ValueError, match=r"both rules must keep k latents a token, or both be dense"):
        HierarchicalSAE(D, 10, 38, k_coarse=2, fine=ReLU()).encode(mx.array(X))


# ---- crosscoder -----------------------------------------------------------------------------------------------


def two_models(n: int = 6000, seed: int = 0) -> np.ndarray:
    """[n, 2, D]: sixteen orthogonal directions, another basis in each model; the last four of each basis carry what one
    model has alone, the other twelve what both have."""
    rng = np.random.default_rng(seed)
    a, b = (np.linalg.qr(m)[0] for m in np.random.default_rng(5).normal(size=(2, D, D)))
    codes = (rng.random((n, 20)) + 0.5) * (rng.random((n, 20)) < 0.1)
    both, only_a, only_b = codes[:, :12], codes[:, 12:16], codes[:, 16:]
    x = np.stack([np.hstack([both, only_a]) @ a, np.hstack([both, only_b]) @ b], axis=1)
    return (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32)


@pytest.mark.parametrize("rule", [TopK, BatchTopK, ReLU])
def test_crosscoder_by_its_definition(rule: Any) -> None:
    cross = Crosscoder(D, 2, D_SAE, rule=rule(K) if rule is not ReLU else ReLU(), seed=0)
    cross.decoder.weight = cross.decoder.weight * mx.random.uniform(0.3, 3, (D_SAE, 1), key=mx.random.key(1))
    cross.decoder.bias = mx.random.normal((2 * D,), key=mx.random.key(2))
    x = two_models(50)
    w_enc, w_dec, b_dec = as64(cross.W_enc, cross.W_dec, cross.b_dec)
    assert (w_enc.shape, w_dec.shape, b_dec.shape) == ((2, D, D_SAE), (D_SAE, 2, D), (2, D))
    z = np.einsum("nsd,sdj->nj", x, w_enc)
    norms = np.linalg.norm(w_dec, axis=2).sum(axis=1)
    np.testing.assert_allclose(cross.decoder_norms(), norms, rtol=1e-5)
    ranked = z * norms
    if rule is TopK:
        kept = ranked >= np.sort(ranked, axis=1)[:, -K, None]
    else:
        kept = ranked >= np.sort(ranked, axis=None)[-K * 50] if rule is BatchTopK else z > 0
    want = np.where(kept, relu(z), 0)
    code = cross.encode(mx.array(x))
    np.testing.assert_allclose(to_dense(code, D_SAE), want, atol=2e-5)
    np.testing.assert_allclose(cross(mx.array(x)), np.einsum("nj,jsd->nsd", want, w_dec) + b_dec, atol=1e-4)
    np.testing.assert_allclose(
        cross(mx.array(x.reshape(50, -1))), np.array(cross(mx.array(x))).reshape(50, -1)
    )
    l1 = L.L1()(L.Forward(cross, mx.array(x), mx.array(x), code, mx.zeros(1)))
    assert l1.item() == pytest.approx((want * norms).sum(axis=1).mean(), rel=1e-4)


def test_aligned_latents_point_one_way_in_every_pair_of_sources() -> None:
    """The second and third rows lie 25 degrees to either side of the first: 50 apart, whose cosine is 0.64."""
    cross, angles = Crosscoder(2, 3, 2, k=1, seed=0), np.radians([[0, 25, -25], [0, 10, -10]])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    cross.decoder.weight = mx.array(rows.reshape(2, 6))
    assert cross.source_cosines(0, 1).min() > 0.9
    assert cross.sharing(0.3, 0.7) == {
        "source_0": 0,
        "source_1": 0,
        "source_2": 0,
        "shared": 2,
        "aligned": 1,
        "other": 0,
    }


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 2), "d_source"), ((8, 0), "n_sources"), ((-2, -3), "d_source")]
)
def test_widths_of_a_crosscoder_are_named(sizes: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=rf"\[Crosscoder\] {name} must be positive but got {name}="):
        Crosscoder(*sizes, 16, k=2)


@pytest.mark.parametrize("rule", ["batchtopk", "relu"])
def test_crosscoder_tells_shared_latents_from_those_of_one_source(rule: str) -> None:
    x = two_models()
    cross = Crosscoder(D, 2, 32, rule=BatchTopK(2) if rule == "batchtopk" else ReLU(), seed=0)
    loss = LossConfig(terms={} if rule == "batchtopk" else {"l1": 0.003}, dead_after=3000)
    source = ArraySource(x.reshape(len(x), -1), batch_size=64, seed=0)
    fit(cross, source, settings(900, loss=loss, normalize_decoder=False))
    got = evaluate(cross, [mx.array(x.reshape(len(x), -1))])
    shares, sharing = cross.source_shares(), cross.sharing(0.35, 0.8)
    assert got["fvu"] < 0.1
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert sum(sharing[n] for n in ("source_0", "source_1", "shared", "other")) == 32
    assert min(sharing["source_0"], sharing["source_1"]) >= 4
    assert sharing["shared"] >= 12
    assert sharing["aligned"] == 0  # the models' bases have nothing to do with each other


# ---- cross-layer transcoder -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [TopK(3), ReLU(), JumpReLU(initial_threshold=0.3)], ids=lambda r: r.architecture
)
def test_cross_layer_by_its_definition(rule: Any) -> None:
    clt = CrossLayerTranscoder(6, 3, 20, rule=rule, seed=0)
    clt.W_decs = [mx.random.normal(w.shape, key=mx.random.key(i)) for i, w in enumerate(clt.W_decs)]
    clt.decoder.bias = mx.random.normal((18,), key=mx.random.key(9))
    x = np.random.default_rng(0).normal(size=(10, 3, 6)).astype(np.float32)
    want = np.tile(np.array(clt.decoder.bias).reshape(1, 3, 6), (10, 1, 1)).astype(np.float64)
    latents = []
    for layer in range(3):
        z = x[:, layer] @ np.array(clt.encoders[layer].weight, np.float64).T
        if isinstance(rule, TopK):
            z = np.where(z >= np.sort(z, axis=1)[:, -3, None], z, 0)
        latents.append(np.where(z > 0.3, z, 0) if isinstance(rule, JumpReLU) else relu(z))
        for later in range(layer, 3):
            want[:, later] += latents[-1] @ np.array(clt.W_dec_of(layer))[:, later - layer]
    code = clt.encode(mx.array(x))
    np.testing.assert_allclose(to_dense(code, 60), np.concatenate(latents, axis=1), atol=1e-5)
    np.testing.assert_allclose(clt(mx.array(x)), want, atol=1e-4)
    np.testing.assert_allclose(clt(mx.array(x.reshape(10, 18))), want.reshape(10, 18), atol=1e-4)
    norms = [np.linalg.norm(np.array(w), axis=1) for w in clt.W_decs]
    np.testing.assert_allclose(clt.decoder_norms(), np.concatenate(norms), rtol=1e-5)


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_cross_layer_learns_and_folds_its_scales(rule: str) -> None:
    """Targets that earlier layers' features explain: a transcoder of each layer alone could not."""
    rng = np.random.default_rng(0)
    codes = (rng.random((6000, 3, 8)) + 0.5) * (rng.random((6000, 3, 8)) < 0.15)
    reads, writes = (np.linalg.qr(rng.normal(size=(n, 8, 8)))[0] for n in (3, 6))
    x = 2 * np.einsum("nlf,lfd->nld", codes, reads)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    y = np.stack(
        [sum(codes[:, a] @ writes[i] for i, (a, b) in enumerate(pairs) if b == m) for m in range(3)], axis=1
    )
    flat = [a.reshape(6000, 24).astype(np.float32) for a in (x, y)]
    clt = CrossLayerTranscoder(
        8, 3, 16, rule=TopK(3) if rule == "topk" else JumpReLU(2, bandwidth=0.3), seed=0
    )
    loss = LossConfig(auxk=None, terms={} if rule == "topk" else {"tanh": 1e-3})
    result = fit(clt, ArraySource(*flat, batch_size=64, seed=0), settings(500, loss=loss, log_every=50))
    got = evaluate(clt, [(mx.array(flat[0][:2000]), mx.array(flat[1][:2000]))])
    assert got["fvu"] < 0.25
    assert result.history[-1]["fvu"] == pytest.approx(got["fvu"], rel=0.5)
    alone = np.linalg.norm(np.array(clt.W_dec_of(0))[:, 1:])
    assert alone > 0.5 * np.linalg.norm(np.array(clt.W_dec_of(0))[:, 0])  # layer 0 does write further on


@pytest.mark.parametrize("preset", sorted(L.AUXK_PRESETS))
def test_auxk_where_pre_activations_are_not_one_product(preset: str) -> None:
    """The dense selection is that of the fused one where both apply; it reaches dead latents of every level alone."""
    dead = mx.arange(48) % 2 == 0
    term, x = L.AuxK(5, preset), mx.array(X)
    plain, hierarchical = SAE(D, 48, k=3, seed=0), HierarchicalSAE(D, 20, 28, k_coarse=2, k_fine=3, seed=0)
    np.testing.assert_allclose(
        term.dense_code(plain, x, dead).values, to_dense(term.code(plain, x, dead), 48), atol=1e-5
    )
    hierarchical.encoder.bias = 0.1 * mx.random.normal((48,), key=mx.random.key(0))
    np.testing.assert_allclose(
        to_dense(term.code(hierarchical, x, dead), 48),
        term.dense_code(hierarchical, x, dead).values,
        atol=1e-5,
    )
    code = to_dense(hierarchical.learn(x, {}).code, 48)
    pre_acts = np.array(hierarchical.pre_acts(x))
    np.testing.assert_allclose(code, np.where(np.array(code) > 0, pre_acts, 0), atol=1e-5)

    clt = CrossLayerTranscoder(D // 2, 2, 24, k=3, seed=0)
    clt.W_decs = [mx.random.normal(w.shape, key=mx.random.key(i)) for i, w in enumerate(clt.W_decs)]
    for sae in (hierarchical, clt):

        def of(x: mx.array, sae: SAE = sae) -> mx.array:
            code, _, pre_acts = sae.learn(x, {})
            return term(L.Forward(sae, x, x, code, sae.decode(code), dead, pre_acts))

        value, grads = nn.value_and_grad(sae, of)(x)
        assert value.item() > 0
        if sae is clt:
            bias = np.concatenate([np.array(e["bias"]) for e in grads["encoders"]])
        else:
            bias = np.array(grads["encoder"]["bias"])
            bias[:20] = np.where(
                np.arange(20) % 2, 0, bias[:20]
            )  # coarse latents also move what the fine level sees
        assert bias.any()
        assert not bias[1::2].any()


def test_cross_layer_revives_the_dead_by_the_default_configuration() -> None:
    clt = CrossLayerTranscoder(D // 2, 2, 24, k=2, seed=0)
    clt.encoders[1].bias = mx.where(mx.arange(24) < 6, mx.array(-5.0), mx.array(0.0))
    history = fit(clt, source(), settings(60, loss=LossConfig(dead_after=640))).history
    assert max(r.get("auxk", 0) for r in history) > 0


def test_bad_cross_layer_transcoders() -> None:
    with pytest.raises(ValueError, match=r"d, n_layers and d_layer must be positive but got 6, 0 and 20"):
        CrossLayerTranscoder(6, 0, 20, k=2)
    with pytest.raises(ValueError, match=r"give either k or rule but got k=None and rule=None"):
        CrossLayerTranscoder(6, 2, 20)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"layer must be in \[0, 2\) but got {layer}"):
            CrossLayerTranscoder(6, 2, 20, k=2).W_dec_of(layer)
    for shape in ((6, 6), (3, 2, 5), (11,)):  # (6, 6) are three tokens' numbers, but not their shape
        with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 12\] but got"):
            CrossLayerTranscoder(6, 2, 20, k=2).encode(mx.zeros(shape))
    with pytest.raises(TypeError, match=r"\[CrossLayerTranscoder\] d must be an int but got float"):
        CrossLayerTranscoder(6.0, 2, 20, k=2)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"dtype must be float32, float16 or bfloat16 but got mlx.core.int32"
    ):
        CrossLayerTranscoder(6, 2, 20, k=2, dtype=mx.int32)
    with pytest.raises(
        ValueError, match=r"must keep k latents a token, or be dense in training, but gives SparseCodeCSR"
    ):
        CrossLayerTranscoder(6, 2, 20, rule=BatchTopK(2)).encode(mx.zeros((3, 12)))


def test_the_fused_engine_says_why_it_cannot() -> None:
    config = settings()
    plain = L.Loss({"mse": (1.0, L.mse)})
    for sae, why in (
        (
            HierarchicalSAE(D, 10, 38, k_coarse=2, k_fine=3),
            "the HierarchicalSAE chooses latents in a way of its own",
        ),
        (Crosscoder(D, 2, 48, k=2), "the Crosscoder chooses latents in a way of its own"),
        (SAE(D, 48, k=2, tied=True), "encoder and decoder are not all of its parameters, or are tied"),
        (SAE(D, 48, k=2, d_out=5, skip=True), "encoder and decoder are not all"),
        (SAE(D, 48, rule=Gated()), "the rule Gated has no fused op"),
    ):
        assert why in FusedEngine.refusal(sae, plain, config)
    assert not FusedEngine.refusal(Crosscoder(D, 2, 48, k=2, rank_by_decoder_norm=False), plain, config)


# ---- where the dictionary starts ------------------------------------------------------------------------------


def test_directions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) * [5, 4, 3, 2, 1, 0.5] @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    rows = np.array(directions("pca", mx.array(x.astype(np.float32)), 20, seed=1))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(rows[:12:2], -rows[1:12:2], atol=1e-6)
    np.testing.assert_allclose(rows[:12:2] @ rows[:12:2].T, np.eye(6), atol=1e-5)
    variance = ((x @ rows[:12:2].T) ** 2).mean(axis=0)
    assert (np.diff(variance) < 0).all()
    assert variance[0] == pytest.approx(np.linalg.eigvalsh(x.T @ x / 500)[-1], rel=1e-4)
    rows = np.array(directions("data", mx.array(x.astype(np.float32)), 20, seed=1))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert (np.abs(rows @ unit.T).max(axis=1) > 1 - 1e-5).all()
    assert directions("data", mx.array(x[:5].astype(np.float32)), 20).shape == (20, 6)
    with pytest.raises(ValueError, match=r"\[directions\] how must be one of"):
        directions("svd", mx.array(x.astype(np.float32)), 3)


@pytest.mark.parametrize("d_out", [None, 5])
@pytest.mark.parametrize("how", ["pca", "data"])
def test_a_start_from_the_data_explains_more(how: str, d_out: int | None) -> None:
    x = mx.array(data(2000))
    y = x if d_out is None else x @ mx.random.normal((D, d_out), key=mx.random.key(0))
    found = {}
    for start in ("keep", how):
        sae = SAE(D, D_SAE, k=K, d_out=d_out, seed=0)
        config = settings(1, decoder_init=start, b_dec_init="mean")
        history = fit(
            sae, ArraySource(x, None if d_out is None else y, batch_size=64, seed=0), config
        ).history
        found[start] = history[0]["fvu"]  # of the very first step
        if start == how and d_out is None:
            assert np.linalg.norm(np.array(sae.W_dec), axis=1) == pytest.approx(1, abs=1e-4)
    assert found[how] < (0.6 if d_out is None else 1) * found["keep"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: directions("pca", x, -5), r"\[directions\] n must be positive but got -5"),
        (
            lambda x: directions("pca", x[:0], 5),
            r"\[directions\] x must have shape \[rows, d\] with rows > 0",
        ),
        (lambda x: initialize(SAE(8, 20, k=2), x * mx.nan), "x must be finite but holds NaN or inf"),
        (lambda x: initialize(SAE(9, 20, k=2), x), r"x must have shape \[n, 9\] with n=10 but got \(10, 8\)"),
        (
            lambda x: initialize_decoder_from_pca(SAE(8, 20, k=2).decoder, []),
            r"of width 8 but got \[\]",
        ),
        (lambda x: initialize_decoder_from_pca(SAE(9, 20, k=2).decoder, [x]), r"be of width 9 but got"),
        (
            lambda x: initialize_encoder_as_transpose(SAE(8, 20, k=2).encoder, SAE(8, 30, k=2).decoder),
            r"must agree in shape but have \(20, 8\) and \(30, 8\)",
        ),
    ],
)
def test_starts_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(mx.random.normal((10, 8), key=mx.random.key(0)))


def test_seeds_names_for_the_start() -> None:
    sae, x = SAE(D, D_SAE, k=K, d_out=D, seed=0), mx.array(data(300))
    initialize_decoder_from_pca(sae.decoder, [x[:100], x[100:]])
    want = directions("pca", x - x.mean(axis=0), D_SAE)
    np.testing.assert_allclose(sae.W_dec, want, atol=1e-6)
    initialize_encoder_as_transpose(sae.encoder, sae.decoder)
    np.testing.assert_array_equal(sae.W_enc, sae.W_dec.T)
    tied = SAE(D, D_SAE, k=K, tied=True, seed=0)
    fit(tied, source(), settings(5, decoder_init="pca"))
    np.testing.assert_array_equal(tied.W_enc, tied.W_dec.T)


@pytest.mark.parametrize("architecture", ["batchtopk", "gated", "jumprelu"])
def test_validation_of_every_kind_of_loss(architecture: str) -> None:
    """Prefixes and gates in the validation's loss, as in training's."""
    config = settings(20, validate_every=10, loss=LossConfig(prefixes=(0.5,), auxk=None))
    sae = SAEConfig(architecture=architecture, d_sae=D_SAE, k=K).build(D)
    result = fit(sae, source(), config, validation=mx.array(data(300, seed=3)))
    last = result.validations[-1]
    assert min(last["val_prefixes"], last["val_fvu"]) > 0
    assert last["val_loss"] == pytest.approx(result.history[-1]["loss"], rel=0.6)


# ---- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["skip", "crosscoder", "ranked", "ranked rows", "tied", "gated transcoder"])
def test_files_of_every_shape(tmp_path: Path, kind: str) -> None:
    """What is loaded computes the same, keeps its kind, and gets a name that SAELens knows or refuses."""
    sae, name = {
        "skip": lambda: (made(JumpReLU(), d_out=D, skip=True), "jumprelu_skip_transcoder"),
        "crosscoder": lambda: (
            Crosscoder(8, 2, D_SAE, rule=BatchTopK(K, threshold=0.9), seed=0),
            "jumprelu_crosscoder",
        ),
        "ranked": lambda: (made(TopK(K), rank_by_decoder_norm=True), "topk"),
        "ranked rows": lambda: (made(BatchTopK(K, threshold=0.3), rank_by_decoder_norm=True), "jumprelu"),
        "tied": lambda: (SAE(D, D_SAE, k=K, tied=True, seed=0), "topk"),
        "gated transcoder": lambda: (SAE(D, D_SAE, rule=Gated(), d_out=5, seed=0), "gated_transcoder"),
    }[kind]()
    if kind == "skip":
        sae.W_skip = mx.random.normal((D, D), key=mx.random.key(1))
    x = mx.array(X)
    io.save(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == name
    again = io.load(tmp_path)
    assert type(again) is type(sae)
    assert type(again.rule) is type(sae.rule)
    np.testing.assert_allclose(again(x), sae(x), atol=1e-5)
    assert np.abs(np.array(sae(x))).max() > 0
    if kind == "crosscoder":
        assert (again.n_sources, again.rank_by_decoder_norm) == (2, True)
        np.testing.assert_allclose(again.source_shares(), sae.source_shares())


@pytest.mark.parametrize(
    "shape", [{}, {"d_out": D}, {"d_out": D, "skip": True}], ids=["sae", "square", "skip"]
)
@pytest.mark.parametrize("architecture", sorted(RULES.keys() - {"hierarchical"}))  # no transcoder
def test_files_of_every_rule(tmp_path: Path, architecture: str, shape: dict[str, Any]) -> None:
    """A transcoder whose target has the width of its input stays one."""
    rule = RULES[architecture](**({"k": 6} if "k" in RULES[architecture].PARAMETERS else {}))
    sae = made(rule, **shape)
    if architecture == "batchtopk":
        rule.threshold = 0.3
    if shape.get("skip"):
        sae.W_skip = mx.random.normal((D, D), key=mx.random.key(1))
    io.save(sae, tmp_path)
    again = io.load(tmp_path)
    assert again.transcoder == sae.transcoder == bool(shape)
    assert (type(again.rule), again.rule.config()) == (type(rule), rule.config())
    x = mx.array(X)
    np.testing.assert_array_equal(again(x), sae(x))
    assert np.abs(np.array(sae(x))).max() > 0


def cross_layer(rule: Any, n_layers: int = 3) -> CrossLayerTranscoder:
    clt = CrossLayerTranscoder(6, n_layers, 20, rule=rule, seed=0)
    clt.W_decs = [mx.random.normal(w.shape, key=mx.random.key(i)) for i, w in enumerate(clt.W_decs)]
    clt.decoder.bias = mx.random.normal((6 * n_layers,), key=mx.random.key(9))
    names = ("mlp.hook_in", "hook_mlp_out")
    inputs, targets = ([f"blocks.{i}.{name}" for i in range(n_layers)] for name in names)
    clt.metadata = {"model_name": "some", "inputs": inputs, "targets": targets}
    return clt


@pytest.mark.parametrize("architecture", sorted(RULES.keys() - {"batchtopk", "hierarchical"}))
def test_files_of_cross_layer_transcoders(tmp_path: Path, architecture: str) -> None:
    clt = cross_layer(RULES[architecture](**({"k": 4} if "k" in RULES[architecture].PARAMETERS else {})))
    if architecture == "jumprelu":
        for i, rule in enumerate(clt.rule.layers):
            rule.threshold = mx.random.uniform(shape=(20,), key=mx.random.key(i))
    io.save(clt, tmp_path)
    x = mx.random.normal((7, 18), key=mx.random.key(3))
    again = io.load(tmp_path)
    np.testing.assert_array_equal(again(x), clt(x))
    assert again.metadata == clt.metadata
    rules = [(type(rule), rule.config()) for rule in again.rule.layers]
    assert rules == [(type(rule), rule.config()) for rule in clt.rule.layers]
    theirs = {p.name for p in tmp_path.glob("W_enc_*")}
    if architecture not in (
        "relu",
        "jumprelu",
    ):  # circuit-tracer would take them for ReLUs: it must not find them
        assert not theirs
        assert not (tmp_path / "config.yaml").exists()
        return
    assert theirs == {f"W_enc_{i}.safetensors" for i in range(3)}
    assert json.loads((tmp_path / "config.yaml").read_text()) == {
        "model_name": "some",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    weights = mx.load(str(tmp_path / "W_dec_1.safetensors"))
    np.testing.assert_array_equal(weights["W_dec_1"], clt.W_dec_of(1))
    for name in ("cfg.json", "metadata.json", "config.yaml"):  # as circuit-tracer leaves it
        (tmp_path / name).unlink()
    np.testing.assert_array_equal(io.load(tmp_path)(x), clt(x))


def test_files_of_cross_layer_transcoders_that_are_damaged_or_replaced(tmp_path: Path) -> None:
    io.save(cross_layer(JumpReLU(4)), tmp_path)
    two = cross_layer(ReLU(), 2)
    two.metadata = {}
    io.save(two, tmp_path)
    assert {p.name for p in tmp_path.iterdir() if "enc" in p.name or "yaml" in p.name} == {
        "W_enc_0.safetensors",
        "W_enc_1.safetensors",
    }
    assert io.load(tmp_path).n_layers == 2
    (tmp_path / "W_dec_1.safetensors").replace(tmp_path / "W_dec_0.safetensors")
    with pytest.raises(ValueError, match=r"W_dec_0.safetensors must hold .*'W_dec': \(20, 2, 6\).* but has"):
        io.load(tmp_path)
    (tmp_path / "W_dec_0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"W_dec_0.safetensors must exist"):
        io.load(tmp_path)


def test_files_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[save\] "):
        io.save(HierarchicalSAE(D, 10, 38, coarse=ReLU(), fine=ReLU()), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_cross_layer_transcoders_hold_their_l0_by_default_terms(rule: str) -> None:
    """Of all layers together."""
    x, y = (mx.random.normal((4000, 2 * D), key=mx.random.key(i)) for i in range(2))
    made = CrossLayerConfig(architecture=rule, k=4, d_sae=40, train=settings(60, log_every=10))
    clt = made.build(D, 2)
    history = fit(clt, ArraySource(x, y + x, batch_size=64, seed=0), made.train).history
    assert {"relu": "l1", "jumprelu": "l0_target"}[rule] in history[0]
    if rule == "jumprelu":
        assert history[-1]["l0"] == pytest.approx(8, rel=0.4)
