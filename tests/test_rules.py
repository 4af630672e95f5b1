"""Rules beyond TopK: what they select, what they learn from, and how they come out of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxsae import SparseCodeCSR, io, to_dense
from mlxsae import loss as L
from mlxsae.code import DenseCode, SparseCode, between, n_tokens, to_slots
from mlxsae.data import ArraySource
from mlxsae.metrics import evaluate, fire_counts, l0
from mlxsae.sae import RULES, SAE, BatchTopK, GroupMax, JumpReLU, calibrate
from mlxsae.sae.straight_through import jump_relu, step
from mlxsae.train import (
    Callback,
    LossConfig,
    NonFiniteError,
    OptimizerConfig,
    Run,
    SAEConfig,
    TrainConfig,
    fit,
)
from test_train import D_SAE, D, K, config, half_dead, source, weights
from test_train import dictionary_data as data


def settings(steps: int = 60, **changes: Any) -> TrainConfig:
    return config(**{"total_tokens": steps * 64} | changes)


# ---- codes --------------------------------------------------------------------------------------------------


def codes() -> list[Any]:
    x = mx.random.normal((7, D), key=mx.random.key(0))
    sae = SAE(D, D_SAE, rule=BatchTopK(K), seed=0)
    csr = sae.encode(x)
    dense = to_dense(csr, D_SAE)
    return [csr, DenseCode(dense), to_slots(csr)]


def test_three_forms_of_one_code_say_the_same() -> None:
    csr, dense, slots = codes()
    assert (type(csr), type(dense), type(slots)) == (SparseCodeCSR, DenseCode, SparseCode)
    sae = SAE(D, D_SAE, rule=BatchTopK(K), seed=0)
    for code in (csr, dense, slots, to_slots(dense)):
        assert n_tokens(code) == 7
        assert l0(code).item() == pytest.approx(K)
        np.testing.assert_array_equal(to_dense(code, D_SAE), dense.values)
        np.testing.assert_array_equal(fire_counts(code, D_SAE), (np.array(dense.values) > 0).sum(axis=0))
        np.testing.assert_allclose(sae.decode(code), sae.decode(dense), atol=1e-5)
        cut = np.where((np.arange(D_SAE) < 20) & (np.arange(D_SAE) >= 5), np.array(dense.values), 0)
        np.testing.assert_array_equal(to_dense(between(code, 5, 20), D_SAE), cut)
    with pytest.raises(ValueError, match=r"\[to_dense\] values must have shape \[..., 9\]"):
        to_dense(dense, 9)


def test_slots_of_no_latents() -> None:
    empty = SparseCodeCSR(mx.zeros(0), mx.zeros(0, mx.uint32), mx.zeros(4, mx.int64))
    assert to_slots(empty).values.shape == (3, 1)
    assert not np.array(to_slots(DenseCode(mx.zeros((3, 5)))).values).any()


def test_padding_does_not_hide_the_first_latent() -> None:
    """Slots that a token does not need name latent 0, with value 0."""
    csr = SparseCodeCSR(mx.array([5.0, 1, 2]), mx.array([0, 1, 2], mx.uint32), mx.array([0, 1, 3], mx.int64))
    want = [[5, 0, 0, 0], [0, 1, 2, 0]]
    np.testing.assert_array_equal(to_dense(csr, 4), want)
    np.testing.assert_array_equal(to_dense(to_slots(csr), 4), want)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("how", [lambda f: f, mx.compile], ids=["eager", "compiled"])
def test_entries_of_one_latent_add_up(lead: tuple[int, ...], how: Any) -> None:
    rng = np.random.default_rng(0)
    values, indices = rng.normal(size=(*lead, 6)).astype(np.float32), rng.integers(0, 4, (*lead, 6))
    want, weight = np.zeros((*lead, 4)), rng.normal(size=(*lead, 4)).astype(np.float32)
    for where in np.ndindex(*lead, 6):
        want[(*where[:-1], indices[where])] += values[where]
    places = mx.array(indices.astype(np.uint32))
    dense = how(lambda v: to_dense(SparseCode(v, places), 4))
    np.testing.assert_allclose(dense(mx.array(values)), want, atol=1e-5)
    gradient = mx.grad(lambda v: (dense(v) * mx.array(weight)).sum())(mx.array(values))
    np.testing.assert_allclose(gradient, np.take_along_axis(weight, indices, axis=-1))
    if lead:
        over = mx.vmap(lambda v, i: to_dense(SparseCode(v, i), 4))
        np.testing.assert_allclose(over(mx.array(values), places), want, atol=1e-5)


@pytest.mark.parametrize("index", [4, 2**31, -1, 2**32 + 1])
def test_latents_past_the_width_are_seen(index: int) -> None:
    """They were written past the end of the array."""
    indices = mx.array([[1, index], [1, 2]], mx.int64)
    values = mx.array([[1.0, 2], [2, 0]])
    want = [[0, 1, 0, np.nan], [0, 2, 0, 0]]
    np.testing.assert_array_equal(to_dense(SparseCode(values, indices), 4), want)
    csr = SparseCodeCSR(values.flatten(), indices.flatten(), mx.array([0, 2, 4], mx.int64))
    np.testing.assert_array_equal(to_dense(csr, 4), want)
    unused = SparseCode(mx.array([[1.0, 0], [2, 0]]), indices)
    np.testing.assert_array_equal(to_dense(unused, 4), [[0, 1, 0, 0], [0, 2, 0, 0]])
    with pytest.raises(ValueError, match=r"\[to_dense\] d_sae must be positive but got 0"):
        to_dense(unused, 0)


# ---- BatchTopK ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxk", [None, "dictionary_learning"])
def test_batch_topk_engines_agree(auxk: str | None) -> None:
    """The one-pass update against autodiff with MLX's Adam, dead latents and threshold included."""
    results = []
    for engine in ("fused", "autodiff"):
        sae = half_dead(SAE(D, D_SAE, rule=BatchTopK(K), seed=0))
        loss = LossConfig(auxk=auxk, dead_after=640, k_aux=6)
        results.append((fit(sae, source(), settings(50, engine=engine, loss=loss, wake=0.0)), sae))
    (fused, sae), (_, other) = results
    assert [r.sae.metadata["training"]["engine"] for r, _ in results] == ["fused", "autodiff"]
    if auxk:
        assert max(r.get("auxk", 0) for r in fused.history) > 0
    for name, mine in weights(sae).items():
        theirs = weights(other)[name]
        assert np.abs(mine - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1e-3) * 5, name
    assert sae.rule.threshold == pytest.approx(other.rule.threshold, rel=1e-4)
    assert fused.history[-1]["l0"] == pytest.approx(K)


def test_threshold_is_the_bias_corrected_mean() -> None:
    rule = BatchTopK(K, decay=0.9)
    sae = SAE(D, D_SAE, rule=rule, seed=0)
    state, smallest = rule.initial_state(), []
    for i in range(5):
        x = mx.array(data(64, seed=i))
        code, state, _ = sae.learn(x, state)
        pre_acts = np.sort(np.array(sae.pre_acts(x)).ravel())
        smallest.append(pre_acts[-K * 64])
        np.testing.assert_allclose(np.array(code.values).min(), smallest[-1], rtol=1e-5)
    powers = 0.9 ** np.arange(4, -1, -1)
    rule.finish(state, scale=2.0)
    assert rule.threshold == pytest.approx((powers @ smallest) / powers.sum() / 2, rel=1e-5)
    fresh = BatchTopK(K)
    fresh.finish(fresh.initial_state(), 1.0)
    assert fresh.threshold is None


def test_in_use_a_token_does_not_depend_on_its_neighbours() -> None:
    sae = SAE(D, D_SAE, rule=BatchTopK(K), seed=0)
    held_out = mx.array(data(2000, seed=7))
    fit(sae, source(), settings(400))
    whole = to_dense(sae.encode(held_out), D_SAE)
    alone = mx.concatenate([to_dense(sae.encode(held_out[i : i + 1]), D_SAE) for i in range(20)])
    np.testing.assert_array_equal(whole[:20], alone)
    pre_acts = np.array(sae.pre_acts(held_out))
    np.testing.assert_allclose(whole, np.where(pre_acts > sae.rule.threshold, pre_acts, 0), atol=1e-5)
    got = evaluate(sae, [held_out])
    assert got["l0"] == pytest.approx(K, rel=0.1)  # the L0 that it achieves, not the one it was asked for
    assert got["fvu"] < 0.15
    assert sae(held_out.reshape(4, 500, D)).shape == (4, 500, D)


def test_calibrate() -> None:
    sae = SAE(D, D_SAE, rule=BatchTopK(K), seed=0)
    x = mx.array(data(500))
    assert l0(sae.encode(x)).item() == K  # of the batch, as long as there is no threshold
    calibrate(sae, [x[:250], x[250:]])
    assert sae.rule.threshold > 0
    assert l0(sae.encode(x)).item() == pytest.approx(K, rel=0.05)
    with pytest.raises(TypeError, match=r"\[calibrate\] the rule must be BatchTopK but is TopK"):
        calibrate(SAE(D, D_SAE, k=2), [x])
    calibrate(sae, [x, mx.zeros((0, D))])  # no tokens, no threshold of 0
    smallest = np.sort(data(500).astype(np.float64) @ np.array(sae.W_enc), axis=None)[-K * 500]
    assert sae.rule.threshold == pytest.approx(smallest, rel=1e-5)
    with pytest.raises(ValueError, match=rf"x must have shape \[\.\.\., {D}\] but got \(3, {2 * D}\)"):
        calibrate(sae, [mx.zeros((3, 2 * D))])
    with pytest.raises(ValueError, match=r"\[calibrate\] there must be at least one batch"):
        calibrate(sae, [])


@pytest.mark.parametrize("rule", [BatchTopK(K), JumpReLU(K)], ids=["batchtopk", "jumprelu"])
def test_resumed_equals_uninterrupted(tmp_path: Path, rule: Any) -> None:
    def run(steps: int | None, resume: bool = False) -> tuple[dict, Any]:
        sae = SAE(D, D_SAE, rule=type(rule)(K), seed=0)
        batches: Any = source()
        if steps:

            class Stop(ArraySource):
                def next_batch(self):  # type: ignore[no-untyped-def]
                    self.n = getattr(self, "n", 0) + 1
                    if self.n > steps:
                        raise KeyboardInterrupt
                    return super().next_batch()

            batches = Stop(data(), batch_size=64, seed=0)
        try:
            fit(sae, batches, settings(), checkpoint_dir=tmp_path if steps or resume else None, resume=resume)
        except KeyboardInterrupt:
            return {}, None
        return weights(sae), sae.rule.config()

    run(33)
    resumed, whole = run(None, resume=True), run(None)
    assert resumed[1] == whole[1]
    for name, a in whole[0].items():
        np.testing.assert_array_equal(resumed[0][name], a, err_msg=name)


def test_a_bad_batch_leaves_the_threshold_alone() -> None:
    batches = [mx.array(data(64, seed=i)) for i in range(6)]
    thresholds, plain = [], settings(normalize="none", b_dec_init="keep")
    for bad in (False, True):
        sae = SAE(D, D_SAE, rule=BatchTopK(K), seed=0)
        if bad:
            with pytest.raises(NonFiniteError):
                fit(sae, [*batches[:4], batches[4] * np.nan, batches[5]], plain)
        else:
            fit(sae, batches[:4], plain)
        thresholds.append(sae.rule.threshold)
    assert thresholds[0] == thresholds[1] > 0


def test_certified_says_which_rule_cannot() -> None:
    sae = SAE(D, D_SAE, rule=GroupMax(K), seed=0)
    with pytest.raises(ValueError, match="the op of the rule GroupMax does not screen in bfloat16"):
        fit(sae, source(), settings(precision="certified"))


# ---- JumpReLU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_input", [False, True])
def test_pseudo_derivatives(through_input: bool) -> None:
    """Against the equations in float64."""
    rng = np.random.default_rng(0)
    z, t, g = rng.normal(size=(50, 9)), rng.random(9), rng.normal(size=(50, 9))
    z[:5, 0] = t[0] + np.array([-0.3, -0.1, 0.0, 0.1, 0.3])
    near = (np.abs((z - t) / 0.4) < 0.5) / 0.4
    args = [mx.array(a.astype(np.float32)) for a in (z, t)]
    for f, slope, height, value in (
        (jump_relu, z > t, t, z * (z > t)),
        (step, 0.0, 1.0, (z > t) * 1.0),
    ):

        def of(z: mx.array, t: mx.array, f: Any = f) -> mx.array:
            return (
                f(z, t, bandwidth=0.4, through_input=through_input) * mx.array(g.astype(np.float32))
            ).sum()

        np.testing.assert_allclose(f(*args, bandwidth=0.4), value, rtol=1e-6)
        dz, dt = mx.grad(of, argnums=(0, 1))(*args)
        assert np.abs(np.array(dt)).min() > 0
        np.testing.assert_allclose(dt, -(g * near * height).sum(axis=0), rtol=1e-4, atol=1e-4)
        expected = g * slope + through_input * g * near * height
        np.testing.assert_allclose(dz, expected, rtol=1e-4, atol=1e-5)


def test_jump_relu_holds_the_l0_it_is_told_to() -> None:
    sae = SAE(D, D_SAE, rule=JumpReLU(K, bandwidth=0.3), seed=0)
    held_out = mx.array(data(2000, seed=7))
    before = evaluate(sae, [held_out])
    result = fit(sae, source(), settings(800, optimizer=OptimizerConfig(learning_rate=3e-3)))
    got = evaluate(sae, [held_out])
    assert got["l0"] == pytest.approx(K, rel=0.15)
    assert before["l0"] > 2 * K
    assert got["fvu"] < 0.2
    assert {"l0_target", "fvu"} <= result.history[-1].keys()
    assert np.array(sae.rule.threshold).min() >= 0
    # What training saw and what the fused pass gives are one function.
    learned = sae.learn(held_out, {}).code
    np.testing.assert_allclose(to_dense(sae.encode(held_out), D_SAE), learned.values, atol=1e-5)


def test_jump_relu_keeps_its_thresholds_in_float32() -> None:
    sae = SAE(D, D_SAE, rule=JumpReLU(K), dtype=mx.bfloat16, seed=0)
    fit(sae, source(), settings(5))
    assert sae.rule.threshold.dtype == mx.float32
    assert sae.W_enc.dtype == mx.bfloat16
    assert not np.array_equal(sae.rule.threshold, sae.rule.threshold.astype(mx.bfloat16).astype(mx.float32))


def test_the_scale_of_the_data_is_folded_into_thresholds() -> None:
    """Training on x and on 8 x from equivalent starts gives the same latents but for the factor."""
    found = []
    for factor in (1.0, 8.0):
        sae = SAE(D, D_SAE, rule=JumpReLU(K, initial_threshold=0.02 * factor), seed=0)
        fit(sae, ArraySource(data() * factor, batch_size=64, seed=0), settings(30))
        found.append(
            (np.array(sae.rule.threshold) / factor, np.array(sae(mx.array(data(50) * factor))) / factor)
        )
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-3)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-2, atol=1e-3)


# ---- files and configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("d_out", [None, 5])
@pytest.mark.parametrize("name", ["batchtopk", "jumprelu"])
def test_files(tmp_path: Path, name: str, d_out: int | None) -> None:
    rule = BatchTopK(K, threshold=0.25) if name == "batchtopk" else JumpReLU(K, bandwidth=0.1)
    sae = SAE(D, D_SAE, rule=rule, d_out=d_out, seed=0)
    if name == "jumprelu":
        sae.rule.threshold = mx.random.uniform(shape=(D_SAE,), key=mx.random.key(1))
    io.save(sae, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == ("jumprelu" if d_out is None else "jumprelu_transcoder")
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].shape == (D_SAE,)
    again = io.load(tmp_path)
    assert again.rule.config() == rule.config()
    assert type(again.rule) is type(rule)
    x = mx.array(data(20))
    np.testing.assert_array_equal(to_dense(again.encode(x), D_SAE), to_dense(sae.encode(x), D_SAE))
    (tmp_path / "metadata.json").unlink()  # as SAELens writes it: a JumpReLU
    again = io.load(tmp_path)
    assert isinstance(again.rule, JumpReLU)
    np.testing.assert_array_equal(to_dense(again.encode(x), D_SAE), to_dense(sae.encode(x), D_SAE))


def test_an_untrained_batch_topk_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[save\] a BatchTopK rule must have a threshold but has none"):
        io.save(SAE(D, D_SAE, rule=BatchTopK(K)), tmp_path)


def test_configuration_builds_rule_and_loss() -> None:
    config = SAEConfig(architecture="jumprelu", d_sae=D_SAE, k=7, rule={"bandwidth": 0.2})
    assert SAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    sae = config.build(D)
    assert (sae.rule.k, sae.rule.bandwidth) == (7, 0.2)
    assert set(config.train.loss.build(sae).terms) == {"l0_target"}
    assert not LossConfig(terms={}).build(sae).terms
    for wrong, message in (
        (dict(architecture="topk", rule={"bandwidth": 1}), "rule must have only the keys"),
        (
            dict(train=TrainConfig(loss=LossConfig(terms={"l0_target": 1.0})), architecture="vq"),
            "architecture",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SAEConfig(**wrong)
    with pytest.raises(ValueError, match=r"terms must be among \[.*\] but got 'l5'"):
        LossConfig(terms={"l5": 1.0})
    with pytest.raises(ValueError, match=r"\[l0\] the rule must have a learned threshold"):
        L.L0Target(3)(L.Forward(SAE(D, D_SAE, k=2), *[mx.zeros((2, D))] * 2, code=None, y_hat=None))  # type: ignore[arg-type]
    for (
        architecture,
        rule,
    ) in (
        RULES.items()
    ):  # AuxK by default where no penalty alone makes the code sparse, else where it is named
        of = {
            name: LossConfig(auxk=name).build(SAEConfig(architecture=architecture, d_sae=128).build(D))
            for name in ("auto", "openai")
        }
        assert (
            (of["auto"].auxk is not None)
            == rule.takes_auxk
            == (architecture not in ("relu", "gated", "sigmoid_gated"))
        )
        assert of["openai"].auxk is not None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BatchTopK(0), ValueError, "k must be positive but got k=0"),
        (lambda: BatchTopK(2.5), TypeError, "k must be an int but got float"),  # type: ignore[arg-type]
        (lambda: BatchTopK(2, decay=1.0), ValueError, r"decay must be in \[0, 1\) but got 1.0"),
        (lambda: SAE(4, 8, rule=BatchTopK(9)), ValueError, r"k must be in \(0, d_sae\] but got k=9"),
        (lambda: JumpReLU(bandwidth=0.0), ValueError, "bandwidth must be positive but got 0"),
        (lambda: JumpReLU(initial_threshold=-1.0), ValueError, "initial_threshold must be at least 0"),
        (lambda: SAE(4, 8, rule=JumpReLU.of(mx.zeros(7))), ValueError, r"threshold must have shape \(8,\)"),
    ],
)
def test_bad_rules(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- reaching a wanted L0 -----------------------------------------------------------------------------------


def test_thresholds_start_where_k_latents_fire() -> None:
    """On data of any scale; and what was trained before keeps its thresholds."""
    got = []
    for factor in (1.0, 8.0):
        sae = SAE(D, D_SAE, rule=JumpReLU(K), seed=0)
        frozen = config(total_tokens=64, optimizer=OptimizerConfig(learning_rate=1e-9))
        fit(sae, ArraySource(data() * factor, batch_size=64, seed=0), frozen)
        got.append(evaluate(sae, [mx.array(data() * factor)])["l0"])
        assert len(np.unique(np.array(sae.rule.threshold))) == 1
    assert got == pytest.approx([K] * len(got), rel=0.1)
    trained = JumpReLU.of(mx.full(D_SAE, 0.25), k=K)
    sae = SAE(D, D_SAE, rule=trained, seed=0)
    fit(sae, source(), frozen)
    np.testing.assert_allclose(np.array(sae.rule.threshold), 0.25, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "terms"),
    [
        ("relu", {"l1": 0.3}),
        ("relu", {"l1": 3e-4}),
        ("gated", {"gate_l1": 0.3, "gate_reconstruction": 1.0}),
        ("gated", {"gate_l1": 3e-4, "gate_reconstruction": 1.0}),
    ],
)
def test_target_l0_is_reached_from_a_wrong_weight(architecture: str, terms: dict[str, float]) -> None:
    """Within a tenth, where the weight as it is misses it by far."""
    found = {}
    for target in (6.0, None):
        loss = LossConfig(terms=terms, target_l0=target, auxk=None)
        config = SAEConfig(d_sae=D_SAE, architecture=architecture, train=settings(400, loss=loss))
        sae = config.build(D)
        fit(sae, source(), config.train)
        found[target] = evaluate(sae, [mx.array(data())])
    assert found[6.0]["l0"] == pytest.approx(6.0, rel=0.1)
    assert abs(found[None]["l0"] / 6.0 - 1) > 0.3
    assert found[6.0]["fvu"] < 0.2
    assert found[6.0]["dead_fraction"] < 0.1


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu", "topk_jumprelu", "sigmoid_gated"])
def test_untrained_saes_begin_where_training_can_go_on(architecture: str) -> None:
    """At the wanted L0, with the reconstruction of the size that explains most; what was trained before stays as it is."""
    target = 6.0 if architecture in ("relu", "gated") else None
    wanted = {"relu": 6.0, "gated": 6.0, "jumprelu": 6.0, "topk_jumprelu": None, "sigmoid_gated": None}
    still = OptimizerConfig(learning_rate=1e-9)
    train = settings(1, optimizer=still, loss=LossConfig(target_l0=target, auxk=None), b_dec_init="mean")
    config = SAEConfig(d_sae=D_SAE, architecture=architecture, k=6, train=train)
    sae, x = config.build(D), mx.array(data())
    fit(sae, source(), config.train)
    code = to_dense(sae.encode(x), D_SAE)
    if (l0 := wanted[architecture]) is not None:
        assert (np.array(code) > 0).sum(axis=1).mean() == pytest.approx(l0, rel=0.1)
    out, about = np.array(sae.written(sae.encode(x))), np.array(x - sae.b_dec)
    assert (out * about).sum() / np.square(out).sum() == pytest.approx(1, abs=0.1)
    if architecture == "gated":
        gate = np.maximum(np.array(sae.pre_acts(x)), 0) @ np.array(sae.W_dec)
        assert (gate * about).sum() / np.square(gate).sum() == pytest.approx(1, abs=0.1)
    before = weights(sae)
    fit(sae, source(), config.train)
    for name, a in weights(sae).items():
        np.testing.assert_allclose(a, before[name], atol=1e-4, err_msg=name)


def test_target_l0_wants_a_penalty() -> None:
    with pytest.raises(ValueError, match=r"target_l0 must come with a term among .* but got \[\]"):
        fit(SAE(D, D_SAE, k=K, seed=0), source(), settings(loss=LossConfig(target_l0=4.0)))


def test_the_controller_goes_on_after_a_resume(tmp_path: Path) -> None:
    def run(**options: Any) -> SAE:
        loss = LossConfig(terms={"l1": 1e-3}, target_l0=6.0, auxk=None)
        sae = SAE(D, D_SAE, rule=SAEConfig(architecture="relu").build(D).rule, seed=0)
        fit(sae, source(), settings(60, loss=loss), **options)
        return sae

    class Stop(Callback):
        def on_step(self, run: Run) -> None:
            if run.state.step == 33:
                raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Stop()], checkpoint_dir=tmp_path)
    resumed = run(checkpoint_dir=tmp_path, resume=True)
    for name, a in weights(whole).items():
        np.testing.assert_array_equal(weights(resumed)[name], a, err_msg=name)
