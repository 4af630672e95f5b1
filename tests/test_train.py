"""fit: learning, engines, resuming, stopping, checkpoints."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxsae import loss as L
from mlxsae import ops
from mlxsae.data import ArraySource, ShuffleBuffer
from mlxsae.io import atomic, load, save
from mlxsae.metrics import evaluate
from mlxsae.sae import SAE, BatchTopK, JumpReLU, ReLU, TopK
from mlxsae.train import (
    Callback,
    LossConfig,
    NonFiniteError,
    OptimizerConfig,
    ProgressBar,
    Run,
    SAEConfig,
    TrainConfig,
    fit,
    train_sae_from_activations,
)
from mlxsae.train.checkpoint import checkpoints
from mlxsae.train.engine import AutodiffEngine, FusedEngine, make_engine
from mlxsae.train.state import flat

D, D_SAE, K = 16, 48, 4


def dictionary_data(n: int = 6000, seed: int = 0, scale: float = 0.3) -> np.ndarray:
    """Sparse positive combinations of unit directions around an offset: what an SAE can explain."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(32, D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = rng.exponential(size=(n, 32)) * (rng.random((n, 32)) < 0.08)
    return (scale * (codes @ directions + 0.5 + 0.01 * rng.normal(size=(n, D)))).astype(np.float32)


def config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        total_tokens=60 * 64,
        batch_size=64,
        sample_size=512,
        log_every=10,
        checkpoint_every=20,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        loss=LossConfig(dead_after=640, k_aux=6),
    )
    return replace(base, **changes)


def source(seed: int = 0) -> ArraySource:
    return ArraySource(dictionary_data(), batch_size=64, seed=seed)


def new_sae(**options: Any) -> SAE:
    return SAE(D, D_SAE, k=K, seed=0, **options)


def weights(sae: SAE) -> dict[str, np.ndarray]:
    return {name: np.array(a.astype(mx.float32)) for name, a in tree_flatten(sae.parameters())}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def half_dead(sae: SAE) -> SAE:
    """A quarter of the latents are too weak to be ever selected."""
    sae.W_enc = mx.where(mx.arange(D_SAE) < 12, 0.01 * sae.W_enc, sae.W_enc)
    return sae


# ---- it learns ---------------------------------------------------------------------------------------------


def test_fit_learns_and_the_sae_takes_raw_activations() -> None:
    sae = new_sae()
    held_out = mx.array(dictionary_data(2000, seed=7))
    before = evaluate(sae, [held_out])["fvu"]
    result = fit(sae, source(), config(total_tokens=800 * 64))
    got = evaluate(sae, [held_out])
    assert result.sae is sae
    assert got["fvu"] < 0.1 < 0.3 < before
    np.testing.assert_allclose(np.linalg.norm(np.array(sae.W_dec), axis=1), 1, atol=1e-5)
    assert result.history[-1]["fvu"] == pytest.approx(
        got["fvu"], rel=0.3
    )  # the scaled run saw the same quality
    training = sae.metadata["training"]
    assert training["steps"] == 800
    assert training["tokens"] == 51_200
    assert TrainConfig.from_dict(training["config"]) == config(total_tokens=800 * 64, wake=0.001)


def test_transcoder_learns_its_target() -> None:
    x = dictionary_data(6000)
    y = np.maximum(x @ np.random.default_rng(1).normal(size=(D, 5)).astype(np.float32), 0) * 40
    coder = new_sae(d_out=5)
    fit(coder, ArraySource(x[:5000], y[:5000], batch_size=64), config(total_tokens=1000 * 64))
    got = evaluate(coder, [(mx.array(x[5000:]), mx.array(y[5000:]))])
    assert got["fvu"] < 0.25
    assert evaluate(new_sae(d_out=5), [(mx.array(x[5000:]), mx.array(y[5000:]))])["fvu"] > 0.9


def test_train_sae_from_activations() -> None:
    settings = SAEConfig(d_sae=D_SAE, k=K, train=config())
    result = train_sae_from_activations(dictionary_data(), settings)
    again = new_sae()
    fit(again, source(), config(decoder_init="data"))
    assert_same_bits(weights(result.sae), weights(again))
    kept = SAEConfig(d_sae=D_SAE, k=K, train=config(decoder_init="keep"))
    fit(again := new_sae(), source(), config())
    assert_same_bits(weights(train_sae_from_activations(dictionary_data(), kept).sae), weights(again))
    with pytest.raises(ValueError, match=r"activations must have shape \[n, d_in\] but got \(2, 3, 4\)"):
        train_sae_from_activations(np.zeros((2, 3, 4)))


def test_auxk_revives_the_dead() -> None:
    """Without AuxK the dead stay dead, with any of its presets they come back."""
    dead = {}
    for preset in (None, *L.AUXK_PRESETS):
        weight = 4.0 if preset == "saelens" else 1.0  # its distance is not normalised
        loss = LossConfig(auxk=preset, auxk_weight=weight, dead_after=640)
        settings = config(total_tokens=400 * 64, loss=loss, optimizer=OptimizerConfig(learning_rate=5e-3))
        history = fit(half_dead(new_sae()), source(), settings).history
        assert history[0]["dead_fraction"] == 12 / D_SAE
        dead[preset] = history[-1]["dead_fraction"]
    assert dead.pop(None) > 0.2
    assert max(dead.values()) < 0.13, dead


def test_batches_from_any_iterable() -> None:
    batches = [mx.array(dictionary_data(64, seed=i)) for i in range(60)]
    a, b = new_sae(), new_sae()
    result = fit(a, batches, config())
    assert result.state.step == 60
    fit(b, iter(batches), config())
    assert_same_bits(weights(a), weights(b))
    short = fit(new_sae(), batches[:7], config())  # the data ends before the plan
    assert (short.state.step, short.state.tokens) == (7, 7 * 64)
    assert [record["step"] for record in short.history] == [7]
    assert short.stopped == "the data ended after 7 of 60 steps"


def test_frozen_parameters_stay() -> None:
    sae = new_sae()
    sae.b_dec = mx.full((D,), 0.1)
    sae.decoder.freeze()
    before = weights(sae)
    fit(sae, source(), config(b_dec_init="mean"))
    after = weights(sae)
    np.testing.assert_array_equal(after["decoder.weight"], before["decoder.weight"])
    np.testing.assert_array_equal(after["decoder.bias"], before["decoder.bias"])
    assert (after["encoder.weight"] != before["encoder.weight"]).any()
    sae.freeze()
    with pytest.raises(
        ValueError, match=r"\[fit\] the SAE must have a parameter to train but all are frozen"
    ):
        fit(sae, source(), config())


@pytest.mark.parametrize("name", ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"])
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_a_start_from_the_data_leaves_frozen_parameters(architecture: str, name: str) -> None:
    """What comes out is what was trained: with a start in their place, it would have been trained around others."""
    sae = SAEConfig(d_sae=D_SAE, architecture=architecture, k=K).build(D)
    part, key = name.split(".")
    sae[part].freeze(keys=[key])
    before = weights(sae)[name]
    held_out = dictionary_data(512, seed=7)
    settings = config(decoder_init="data", loss=LossConfig(auxk=None))
    found = fit(sae, source(), settings, validation=held_out).validations[-1]
    np.testing.assert_array_equal(weights(sae)[name], before)
    assert evaluate(sae, [mx.array(held_out)])["fvu"] == pytest.approx(found["val_fvu"], rel=0.05)


def test_sixteen_bit_saes_train_in_float32() -> None:
    low, full = new_sae(dtype=mx.bfloat16), new_sae()
    full.update({k: v for k, v in low.parameters().items()})
    full.set_dtype(mx.float32)
    state = fit(low, source(), config()).state
    assert {a.dtype for _, a in tree_flatten(state.params)} == {mx.float32}
    assert low.W_enc.dtype == mx.bfloat16
    fit(full, source(), config())
    full.set_dtype(mx.bfloat16)
    assert_same_bits(weights(low), weights(full))


def test_b_dec_starts_where_it_should() -> None:
    x = mx.array(dictionary_data())
    still = OptimizerConfig(learning_rate=1e-12)
    for init, expected in (("mean", np.array(x.mean(axis=0))), ("keep", np.zeros(D))):
        sae = new_sae()
        fit(sae, source(), config(b_dec_init=init, sample_size=6000, optimizer=still, total_tokens=64))
        np.testing.assert_allclose(np.array(sae.b_dec), expected, atol=1e-4)
    sae = new_sae()
    fit(sae, source(), config(sample_size=6000, optimizer=still, total_tokens=64))
    cost = lambda p: np.linalg.norm(np.array(x) - p, axis=1).sum()  # noqa: E731
    assert cost(np.array(sae.b_dec)) < cost(np.array(x.mean(axis=0)))


# ---- one step, from the equations --------------------------------------------------------------------------


def test_steps_match_numpy_adam() -> None:
    """Three steps with projection, clipping, schedule and renorm against float64 from the equations."""
    sae, x = new_sae(), dictionary_data(192)
    sae.b_enc = mx.random.normal((D_SAE,), key=mx.random.key(1)) * 0.1
    o = OptimizerConfig(
        learning_rate=1e-2, betas=(0.8, 0.95), eps=1e-8, warmup=0.5, decay=0.5, max_grad_norm=0.5
    )
    settings = config(
        total_tokens=192, optimizer=o, b_dec_init="keep", normalize="none", loss=LossConfig("mse", auxk=None)
    )
    p = {name: a.astype(np.float64) for name, a in weights(sae).items()}
    m, v = ({name: np.zeros_like(a) for name, a in p.items()} for _ in range(2))
    fit(sae, [mx.array(x[i : i + 64]) for i in (0, 64, 128)], settings)
    # Three steps: warm-up over round(1.5) = 2 of them, decay over the last 2.
    for step, factor in enumerate((0.5, 1.0, 0.5)):
        batch = x[step * 64 : step * 64 + 64].astype(np.float64)
        inner = batch - p["decoder.bias"]
        pre = inner @ p["encoder.weight"].T + p["encoder.bias"]
        top = np.argsort(-pre, axis=1, kind="stable")[:, :K]
        f = np.zeros_like(pre)
        np.put_along_axis(f, top, np.maximum(np.take_along_axis(pre, top, 1), 0), 1)
        d_out = 2 / 64 * (f @ p["decoder.weight"] + p["decoder.bias"] - batch)
        d_pre = (d_out @ p["decoder.weight"].T) * (f > 0)
        g = {
            "encoder.weight": d_pre.T @ inner,
            "encoder.bias": d_pre.sum(0),
            "decoder.weight": f.T @ d_out,
            "decoder.bias": d_out.sum(0) - (d_pre @ p["encoder.weight"]).sum(0),
        }
        w = p["decoder.weight"]
        g["decoder.weight"] -= (g["decoder.weight"] * w).sum(1, keepdims=True) * w
        norm = math.sqrt(sum((a**2).sum() for a in g.values()))
        assert norm > 0.5  # clipping bites
        for name in p:
            gradient = g[name] * 0.5 / norm
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.95 * v[name] + 0.05 * gradient**2
            m_hat, v_hat = m[name] / (1 - 0.8 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            p[name] = p[name] - 1e-2 * factor * m_hat / (np.sqrt(v_hat) + 1e-8)
        p["decoder.weight"] /= np.linalg.norm(p["decoder.weight"], axis=1, keepdims=True)
    for name, a in weights(sae).items():
        np.testing.assert_allclose(a, p[name], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("d_out", [None, 9])
@pytest.mark.parametrize(
    ("changes", "optimizer", "loss"),
    [
        ({}, {}, {}),
        ({}, {"max_grad_norm": 0.01}, {}),
        ({"normalize": "none"}, {"betas": (0.8, 0.95)}, {"reconstruction": "mse", "auxk": None}),
        ({"normalize_decoder": False}, {}, {"reconstruction": "nmse", "auxk": "sparsify"}),
    ],
)
def test_two_engines_one_law(d_out: int | None, changes: dict, optimizer: dict, loss: dict) -> None:
    """From one start, with dead latents, both engines have the same parameters after 50 steps."""
    x = dictionary_data()
    y = x @ np.random.default_rng(3).normal(size=(D, 9)).astype(np.float32)
    saes, states = [], []
    for engine in ("autodiff", "fused"):
        sae = new_sae(d_out=d_out)
        sae.W_enc = mx.where(mx.arange(D_SAE) < 12, 0.01 * sae.W_enc, sae.W_enc)
        o = OptimizerConfig(**({"learning_rate": 1e-3} | optimizer))
        auxk = LossConfig(**({"dead_after": 128, "k_aux": 6, "auxk_weight": 0.5} | loss))
        settings = config(total_tokens=50 * 64, engine=engine, optimizer=o, loss=auxk, **changes)
        data = ArraySource(x, None if d_out is None else y, batch_size=64)
        result = fit(sae, data, settings)
        assert sae.metadata["training"]["engine"] == engine
        assert auxk.auxk is None or any(r.get("auxk", 0) > 0 for r in result.history)
        saes.append(sae)
        states.append(dict(tree_flatten(result.state.arrays)))
    assert states[0].keys() == states[1].keys()
    np.testing.assert_array_equal(*(np.array(s["tokens_since_fired"]) for s in states))
    for name in states[0]:
        a, b = (np.array(s[name], np.float64) for s in states)
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1e-3), name


def test_a_fused_step_copies_no_weights_and_holds_no_dense_latents() -> None:
    """What a step needs beyond its state stays far below one weight matrix and below [n, d_sae]."""
    n, d, d_sae = 128, 64, 20_000
    peaks = []

    class Peak(Callback):
        def on_step(self, run: Run) -> None:
            mx.eval(run.state.arrays)
            peaks.append(mx.get_peak_memory() - mx.get_active_memory())
            mx.reset_peak_memory()

    batches = [mx.random.normal((n, d), key=mx.random.key(i)) for i in range(14)]
    mx.eval(batches)
    settings = TrainConfig(14 * n, n, engine="fused", sample_size=n, loss=LossConfig(dead_after=100))
    fit(SAE(d, d_sae, k=8, seed=0), batches, settings, callbacks=[Peak()])
    assert max(peaks[2:]) < d_sae * d * 4 / 4  # the first step leaves the caller's weights behind
    assert d_sae * d * 4 < n * d_sae * 4


STEP_MEMORY = """
import mlx.core as mx
from mlxsae.sae import SAE
from mlxsae.train import Callback, LossConfig, TrainConfig, fit

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

class Peak(Callback):
    rose = 0
    def on_step(self, run):
        mx.eval(run.state.arrays)
        assert run.engine.name == "fused"
        if run.state.step > 11:
            assert run.state.auxk_active == (DEAD_AFTER == 1)
            self.rose = max(self.rose, status("VmHWM") - self.before)
        self.before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak starts anew

n, d, d_sae, k, steps = 256, 256, 81_920, 16, 14
batches = [mx.random.normal((n, d), key=mx.random.key(i)) for i in range(steps)]
mx.eval(batches)
mx.set_cache_limit(0)  # what is freed is gone, so that nothing hides in it
peak = Peak()
loss = LossConfig(dead_after=DEAD_AFTER, k_aux=16)
fit(SAE(d, d_sae, k=k, seed=0), batches, TrainConfig(steps * n, n, sample_size=n, loss=loss), callbacks=[peak])
print(peak.rose, 64 * 2**20 + 64 * n * k + 12 * n * d, min(4 * d_sae * d, 4 * n * d_sae))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak resident size")
@pytest.mark.parametrize("dead_after", [1, 10**9])
def test_resident_memory_of_a_step(dead_after: int) -> None:
    """Beyond state and batch at most 64 MB + 64 n k + 12 n d bytes, scratch of the kernels and AuxK included."""
    script = STEP_MEMORY.replace("DEAD_AFTER", str(dead_after))
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    rose, allowed, one_array = map(int, out.split())  # of weights, or of dense latents
    assert rose <= allowed < one_array


@pytest.mark.parametrize("engine", ["autodiff", "fused"])
def test_only_the_state_holds_the_weights(engine: str) -> None:
    """Between steps nothing is alive but the state, the caller's SAE and the data."""
    n, d, d_sae = 32, 64, 20_000
    batches = [mx.random.normal((n, d), key=mx.random.key(i)) for i in range(4)]
    # It trains in float32, so its own weights are no buffers of the state.
    sae = SAE(d, d_sae, k=4, seed=0, dtype=mx.bfloat16)
    mx.eval(batches, sae.parameters())
    gc.collect()
    extra, before = [], mx.get_active_memory()

    class Watch(Callback):
        def on_step(self, run: Run) -> None:
            mx.eval(run.state.arrays)
            state = sum(a.nbytes for _, a in tree_flatten(run.state.arrays))
            extra.append(mx.get_active_memory() - before - state)

    settings = TrainConfig(4 * n, n, engine=engine, sample_size=n, loss=LossConfig(auxk=None))
    fit(sae, batches, settings, callbacks=[Watch()])
    assert max(extra) < d_sae * d * 4 / 4


def test_auto_takes_the_fused_engine_where_it_can() -> None:
    def engine_of(loss: L.Loss | None = None, sae: SAE | None = None, **changes: Any) -> str:
        trained = fit(sae or new_sae(), source(), config(total_tokens=64, **changes), loss=loss).sae
        return trained.metadata["training"]["engine"]

    assert engine_of() == "fused"
    assert (
        engine_of(loss=L.Loss({"mse": (1.0, L.mse)}, terms={"l1": (0.1, lambda f: f.code.values.sum())}))
        == "autodiff"
    )
    assert engine_of(loss=L.Loss({"mse": (1.0, L.mse)}, (1.0, L.AuxK(4, "saelens")))) == "autodiff"

    assert engine_of(sae=SAE(D, D_SAE, rule=BatchTopK(K), seed=0)) == "fused"
    assert engine_of(sae=SAE(D, D_SAE, rule=JumpReLU(K), seed=0)) == "autodiff"
    frozen = new_sae()
    frozen.encoder.freeze()
    assert engine_of(sae=frozen) == "autodiff"
    with pytest.raises(
        ValueError, match=r"engine must be autodiff for this run but got fused: some parameters are frozen"
    ):
        engine_of(sae=frozen, engine="fused")


def test_tokens_since_fired_counts_tokens() -> None:
    sae = new_sae()
    sae.b_enc = mx.where(mx.arange(D_SAE) < 5, mx.array(-1e3), mx.array(0.0))
    state = fit(sae, source(), config(loss=LossConfig(auxk=None, dead_after=640))).state
    assert (np.array(state.tokens_since_fired)[:5] == 60 * 64).all()
    assert np.array(state.tokens_since_fired)[5:].min() == 0


def test_any_loss_any_optimizer() -> None:
    """A user's term and an MLX optimiser go through the same loop."""
    sae = new_sae()
    loss = L.Loss({"mse": (1.0, L.mse)}, terms={"l1": (0.01, lambda f: f.code.values.sum(axis=-1).mean())})
    settings = config()
    optimizer = optim.Lion(1e-3)
    working = new_sae()
    result = fit(sae, source(), settings, engine=AutodiffEngine(working, loss, settings, optimizer))
    assert {"mse", "l1", "loss"} <= result.history[-1].keys()
    assert result.history[-1]["mse"] < result.history[0]["mse"]
    last = result.history[-1]
    assert last["loss"] == pytest.approx(last["mse"] + 0.01 * last["l1"], rel=1e-5)


# ---- dead latents and the second selection ------------------------------------------------------------------


def arrays_of(sae: SAE, engine: Any, tokens_since_fired: mx.array) -> dict[str, Any]:
    params = sae.trainable_parameters()
    params.pop("rule", None)
    return {
        "params": params,
        "optimizer": engine.optimizer_state(params),
        "tokens_since_fired": tokens_since_fired,
        "failed": mx.array([-1, 0], mx.int32),
    }


@pytest.mark.parametrize("preset", sorted(L.AUXK_PRESETS))
@pytest.mark.parametrize("name", ["autodiff", "fused"])
def test_dead_is_what_was_silent_before_the_batch(name: str, preset: str) -> None:
    """Among the dead are latents that fire in this batch, among the living ones whose patience ends with it."""
    sae, x = new_sae(), mx.array(dictionary_data(64))
    fires = np.zeros(D_SAE, bool)
    code = sae.encode(x)
    fires[np.array(code.indices)[np.array(code.values) > 0]] = True
    assert 4 < fires.sum() < D_SAE - 4
    before = mx.array(np.where(np.arange(D_SAE) % 3 == 0, 640, 639).astype(np.int32))
    dead = before >= 640
    settings = config(loss=LossConfig(auxk=preset, k_aux=6, dead_after=640))
    loss = settings.loss.build(sae)
    if name == "fused" and not L.AuxK(6, preset).fused:
        with pytest.raises(ValueError, match=f"the AuxK preset {preset} has no fused form"):
            make_engine(name, sae, loss, settings)
        return
    engine = make_engine(name, sae, loss, settings)
    after, metrics = engine.step(arrays_of(sae, engine, before), x, x, lr=1e-3, step=0, auxk=True)
    expected = L.AuxK(6, preset)(L.Forward(sae, x, x, code, sae.decode(code), dead))
    assert expected.item() > 0
    assert metrics["auxk"].item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_array_equal(np.array(after["tokens_since_fired"]) == 0, fires)
    assert metrics["dead_fraction"].item() == pytest.approx((~fires).mean())  # after the batch


@pytest.mark.parametrize("name", ["autodiff", "fused"])
def test_waking_raises_the_biases_of_the_dead(name: str) -> None:
    """Of those that were dead before the batch, also of one that fires in it, and of no other; nothing else changes."""
    x, after = mx.array(dictionary_data(64)), {}
    before = mx.array(np.where(np.arange(D_SAE) % 3 == 0, 640, 639).astype(np.int32))
    for wake in (0.0, 0.25):
        sae, settings = new_sae(), config(wake=wake, loss=LossConfig(dead_after=640))
        engine = make_engine(name, sae, settings.loss.build(sae), settings)
        arrays, _ = engine.step(arrays_of(sae, engine, before), x, x, lr=1e-3, step=0, auxk=True)
        after[wake] = {key: np.array(a) for key, a in flat(arrays["params"]).items()}
    rise = np.array(after[0.25].pop("encoder.bias")) - np.array(after[0.0].pop("encoder.bias"))
    np.testing.assert_allclose(rise, np.where(np.arange(D_SAE) % 3 == 0, 0.25, 0), atol=1e-6)
    assert_same_bits(after[0.25], after[0.0])


def test_waking_wants_a_bias_to_raise() -> None:
    sae = new_sae()
    sae.encoder.freeze(keys="bias")
    with pytest.raises(
        ValueError, match=r"wake must be 0 where no encoder bias of an SAE of ours is trained"
    ):
        fit(sae, source(), config(wake=0.01))
    # By default it rises where it can and AuxK is asked for, and the resumed run is held to that.
    without = LossConfig(auxk=None)
    for some, settings, wake in (
        (sae, config(), 0.0),
        (new_sae(), config(), 0.001),
        (new_sae(), config(loss=without), 0.0),
    ):
        assert fit(some, source(), settings).sae.metadata["training"]["config"]["wake"] == wake


def test_the_second_selection_shares_the_product_and_is_skipped_while_nothing_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Any:
        op = getattr(ops, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return op(*arguments, **options)

        return call

    for name in ("topk_encode", "topk_encode_masked"):
        monkeypatch.setattr(ops, name, counted(name))
    settings = config(total_tokens=30 * 64, loss=LossConfig(dead_after=64 * 15, k_aux=6))
    fit(half_dead(new_sae()), source(), settings)
    assert calls == ["topk_encode"] * 20 + ["topk_encode_masked"] * 10


# ---- certified low precision -------------------------------------------------------------------------------


def wide_config(precision: str, **changes: Any) -> TrainConfig:
    auxk = LossConfig(dead_after=96, k_aux=8)
    return config(total_tokens=50 * 32, batch_size=32, loss=auxk, precision=precision, **changes)


def wide_sae(rule: type[TopK | BatchTopK] = TopK) -> SAE:
    sae = SAE(128, 700, rule=rule(8), seed=0)
    sae.W_enc = mx.where(mx.arange(700) < 50, 0.01 * sae.W_enc, sae.W_enc)
    return sae


def wide_rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(2000, 200)) * (rng.random((2000, 200)) < 0.05)
    return (codes @ rng.normal(size=(200, 128)) + 0.5).astype(np.float32)


def wide_source() -> ArraySource:
    return ArraySource(wide_rows(), batch_size=32, seed=0)


def timeless(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in history]


@pytest.mark.parametrize(("rule", "max_grad_norm"), [(TopK, None), (TopK, 0.5), (BatchTopK, None)])
def test_certified_training_has_the_bits_of_float32(
    rule: type[TopK | BatchTopK], max_grad_norm: float | None
) -> None:
    optimizer = OptimizerConfig(learning_rate=3e-3, max_grad_norm=max_grad_norm)
    exact, certified = (
        fit(wide_sae(rule), wide_source(), wide_config(p, optimizer=optimizer))
        for p in ("float32", "certified")
    )
    assert any(r.get("auxk", 0) > 0 for r in exact.history)
    assert timeless(exact.history) == timeless(certified.history)
    assert_same_bits(weights(exact.sae), weights(certified.sae))
    a, b = (dict(tree_flatten(r.state.to_files()[1])) for r in (exact, certified))
    assert_same_bits({n: np.array(v) for n, v in a.items()}, {n: np.array(v) for n, v in b.items()})
    # The shadow went along with the encoder.
    assert exact.state.shadow is None
    fresh = ops.encoder_shadow(certified.state.params["encoder"]["weight"])
    for kept, made in zip(certified.state.shadow, fresh, strict=True):
        np.testing.assert_array_equal(np.array(kept.astype(mx.float32)), np.array(made.astype(mx.float32)))


def test_certified_run_resumes_without_a_stored_shadow(tmp_path: Path) -> None:
    settings = wide_config("certified")
    whole = fit(wide_sae(), wide_source(), settings)
    with pytest.raises(KeyboardInterrupt):
        fit(wide_sae(), wide_source(), settings, callbacks=[StopAt(33)], checkpoint_dir=tmp_path)
    stored = mx.load(str(checkpoints(tmp_path)[-1] / "state.safetensors"))
    assert "state.params.encoder.weight" in stored
    assert not [name for name in stored if "shadow" in name]
    resumed = fit(wide_sae(), wide_source(), settings, checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(resumed.sae), weights(whole.sae))
    assert timeless(resumed.history) == timeless(whole.history)


def test_certified_wants_the_fused_engine() -> None:
    with pytest.raises(
        ValueError, match=r"precision must be float32 or tf32 for the autodiff engine but got certified: aut"
    ):
        fit(new_sae(), source(), config(precision="certified", engine="autodiff"))
    signed = LossConfig(auxk="saelens")
    with pytest.raises(ValueError, match=r"but got certified: the AuxK preset saelens has no fused form"):
        fit(new_sae(), source(), config(precision="certified", loss=signed))


# ---- inexact products, moments in bfloat16 --------------------------------------------------------------------


def final_fvu(result: Any) -> float:
    return float(np.mean([r["fvu"] for r in result.history[-2:]]))


@pytest.mark.parametrize("rule", [TopK, BatchTopK])
def test_named_inexact_products_train(rule: type[TopK | BatchTopK]) -> None:
    """tf32 is float32 on a CPU, in bits; bfloat16 comes as far, by other bits, on a shadow that keeps up."""
    exact, tf32, low = (
        fit(wide_sae(rule), wide_source(), wide_config(p)) for p in ("float32", "tf32", "bfloat16")
    )
    assert any(r.get("auxk", 0) > 0 for r in low.history)
    if mx.default_device() == mx.cpu:
        assert_same_bits(weights(exact.sae), weights(tf32.sae))
    assert final_fvu(low) == pytest.approx(final_fvu(exact), rel=0.02)
    assert final_fvu(low) != final_fvu(exact)
    assert low.state.shadow is not None
    fresh = ops.encoder_shadow(low.state.params["encoder"]["weight"], dtype=mx.bfloat16)
    for kept, made in zip(low.state.shadow, fresh, strict=True):
        np.testing.assert_array_equal(np.array(kept.astype(mx.float32)), np.array(made.astype(mx.float32)))
    assert all(a.dtype == mx.float32 for _, a in tree_flatten(low.sae.parameters()))


def test_dense_rules_train_by_the_named_product(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    """The autodiff engine's products are MLX's: where those are TF32, it says so unless that was asked for."""
    settings = config(total_tokens=3 * 64, engine="autodiff")
    monkeypatch.setattr(ops, "products_are_tf32", lambda: True)
    fit(new_sae(), source(), settings)  # TopK's product is ours
    fit(SAE(D, D_SAE, rule=ReLU()), source(), replace(settings, precision="tf32"))
    assert not [w for w in recwarn if "TF32" in str(w.message)]
    with pytest.warns(UserWarning, match="MLX multiplies float32 in TF32"):
        fit(SAE(D, D_SAE, rule=ReLU()), source(), settings)


def test_moments_in_bfloat16_train_as_well(tmp_path: Path) -> None:
    """As far as float32 ones, in a third less memory, with every other bit the same after a kill."""
    low = OptimizerConfig(learning_rate=3e-3, moments="bfloat16")
    settings = wide_config("certified", optimizer=low)
    exact = fit(wide_sae(), wide_source(), wide_config("certified"))
    whole = fit(wide_sae(), wide_source(), settings)
    assert final_fvu(whole) == pytest.approx(final_fvu(exact), rel=0.02)
    sizes = [
        sum(a.nbytes for tree in (r.state.params, r.state.optimizer) for _, a in tree_flatten(tree))
        for r in (whole, exact)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(2 / 3, abs=0.01)
    with pytest.raises(KeyboardInterrupt):
        fit(wide_sae(), wide_source(), settings, callbacks=[StopAt(33)], checkpoint_dir=tmp_path)
    stored = mx.load(str(checkpoints(tmp_path)[-1] / "state.safetensors"))
    kinds = {name: a.dtype for name, a in stored.items() if name.startswith("state.optimizer.encoder")}
    assert kinds == {
        f"state.optimizer.encoder.{name}.{moment}": mx.bfloat16 if name == "weight" else mx.float32
        for name in ("weight", "bias")
        for moment in "mv"
    }
    resumed = fit(wide_sae(), wide_source(), settings, checkpoint_dir=tmp_path, resume=True)
    for (name, a), (_, b) in zip(
        tree_flatten(whole.state.to_files()[1]), tree_flatten(resumed.state.to_files()[1]), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(*(np.array(q.astype(mx.float32)) for q in (a, b)), err_msg=name)
    with pytest.raises(ValueError, match=r"\[resume\] optimizer\.moments must be 'bfloat16' as in"):
        fit(wide_sae(), wide_source(), wide_config("certified"), checkpoint_dir=tmp_path, resume=True)


def test_moments_in_bfloat16_want_the_fused_adam() -> None:
    low = OptimizerConfig(moments="bfloat16")
    with pytest.raises(
        ValueError, match="moments must be float32 for the autodiff engine but got bfloat16: aut"
    ):
        fit(new_sae(), source(), config(engine="autodiff", optimizer=low))
    with pytest.raises(ValueError, match=r"\[config\] moments must be float32 for lion"):
        OptimizerConfig(moments="bfloat16", name="lion")


# ---- Adam that spares rows -------------------------------------------------------------------------------------


class Exported(Callback):
    """The weights at step 50, and the share of rows that were behind before each."""

    def __init__(self) -> None:
        self.weights: dict[str, np.ndarray] = {}
        self.behind = [0.0]

    def on_step(self, run: Run) -> None:
        if run.state.lazy is not None:
            self.behind.append((run.state.lazy.last_step < run.state.step).astype(mx.float32).mean().item())
        if run.state.step == 50:
            self.weights = weights(run.export())
            assert run.state.lazy is None


@pytest.mark.parametrize(
    ("moments", "rule", "precision"), [("float32", TopK, "certified"), ("bfloat16", BatchTopK, "float32")]
)
def test_lazy_adam_has_the_bits_of_dense_adam(
    moments: str, rule: type[TopK | BatchTopK], precision: str, tmp_path: Path
) -> None:
    """Over two windows, with AuxK at work; validated and exported in the middle, stopped and resumed."""
    held_out = mx.array(wide_rows()[:40])

    def run(variant: str, watch: Exported, *more: Callback, **options: Any) -> Any:
        optimizer = OptimizerConfig(learning_rate=3e-3, moments=moments, variant=variant)
        settings = wide_config(precision, optimizer=optimizer, validate_every=37)
        settings = replace(settings, total_tokens=150 * 32)
        return fit(
            wide_sae(rule), wide_source(), settings, validation=held_out, callbacks=[watch, *more], **options
        )

    dense, lazy, again = Exported(), Exported(), Exported()
    whole = run("dense", dense)
    with pytest.raises(KeyboardInterrupt):
        run("lazy", lazy, StopAt(131), checkpoint_dir=tmp_path)
    resumed = run("lazy", again, checkpoint_dir=tmp_path, resume=True)
    assert max(lazy.behind) > 0.2
    assert max(again.behind) > 0.2
    assert dense.behind == [0]
    assert resumed.state.lazy is None
    assert any(r.get("auxk", 0) > 0 for r in whole.history)
    assert timeless(whole.history) == timeless(resumed.history)
    assert whole.validations == resumed.validations
    assert_same_bits(dense.weights, lazy.weights)
    assert_same_bits(weights(whole.sae), weights(resumed.sae))
    mine, theirs = (result.state.to_files()[1] for result in (whole, resumed))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mx.array_equal(mine[name], theirs[name], equal_nan=True).item(), name


def test_a_run_under_lazy_adam_that_fails_keeps_the_weights_before() -> None:
    x = np.tile(wide_rows(), (2, 1))
    x[70 * 32 + 5] = np.nan
    kept = []
    for variant in ("dense", "lazy"):
        optimizer = OptimizerConfig(learning_rate=3e-3, variant=variant)
        settings = replace(wide_config("float32", optimizer=optimizer), total_tokens=100 * 32)
        sae = wide_sae()
        with pytest.raises(NonFiniteError, match="batch 70"):
            fit(sae, [mx.array(x[i : i + 32]) for i in range(0, len(x), 32)], settings)
        kept.append(weights(sae))
    assert_same_bits(*kept)


class TurnsBack(Callback):
    """Keeps the state of one step and goes back to it later, once."""

    def __init__(self, keep: int, back: int):
        self.keep, self.back, self.kept = keep, back, None

    def on_step(self, run: Run) -> None:
        if run.state.step == self.keep:
            self.kept = run.state
        elif run.state.step == self.back and self.kept is not None:
            run.state, self.kept = self.kept, None


@pytest.mark.parametrize("validate_every", [10, 1000])
def test_a_state_under_lazy_adam_that_a_callback_kept_stays_the_same_state(validate_every: int) -> None:
    results = []
    for variant in ("dense", "lazy"):
        optimizer = OptimizerConfig(learning_rate=3e-3, variant=variant)
        settings = wide_config("float32", optimizer=optimizer, validate_every=validate_every)
        held_out = mx.array(wide_rows()[:40])
        results.append(
            fit(wide_sae(), wide_source(), settings, validation=held_out, callbacks=[TurnsBack(15, 22)])
        )
    assert_same_bits(*(weights(result.sae) for result in results))
    dense, lazy = (flat(result.state.optimizer) for result in results)
    for name in dense:
        assert mx.array_equal(dense[name], lazy[name]).item(), name


def test_a_step_under_lazy_adam_that_an_error_ends_leaves_the_weights_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []
    for variant in ("dense", "lazy"):
        optimizer = OptimizerConfig(learning_rate=3e-3, variant=variant)
        sae, calls, update = wide_sae(), [], ops.feature_update

        def interrupted(*args: Any, calls: list = calls, update: Any = update, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 40:
                raise KeyboardInterrupt
            return update(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(ops, "feature_update", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fit(sae, wide_source(), wide_config("float32", optimizer=optimizer))
        kept.append(weights(sae))
    assert_same_bits(*kept)


def test_lazy_adam_settles_by_the_engine_s_own_configuration() -> None:
    run, results = wide_config("float32"), []
    for variant in ("dense", "lazy"):
        own = OptimizerConfig(betas=(0.5, 0.9), eps=1e-4, variant=variant)
        sae = wide_sae()
        loss = run.loss.build(sae, run.total_steps)
        engine = FusedEngine(sae, loss, replace(run, optimizer=own, normalize_decoder=False))
        results.append(weights(fit(sae, wide_source(), run, engine=engine).sae))
    assert_same_bits(*results)


def test_row_sparse_adam_leaves_rows_that_a_batch_does_not_use() -> None:
    results = {}
    for variant in ("dense", "row_sparse"):
        optimizer = OptimizerConfig(learning_rate=3e-3, variant=variant)
        results[variant] = fit(wide_sae(), wide_source(), wide_config("certified", optimizer=optimizer))
    before, after = weights(wide_sae()), weights(results["row_sparse"].sae)
    never = np.array(results["row_sparse"].state.optimizer["encoder"]["bias"]["v"]) == 0
    assert never.any()
    assert not never.all()
    changed = (before["encoder.weight"] != after["encoder.weight"]).any(axis=1)
    np.testing.assert_array_equal(changed, ~never)
    assert final_fvu(results["row_sparse"]) == pytest.approx(final_fvu(results["dense"]), rel=0.1)
    assert final_fvu(results["row_sparse"]) != final_fvu(results["dense"])


def test_variants_of_adam_want_the_fused_one() -> None:
    lazy = OptimizerConfig(variant="lazy")
    with pytest.raises(ValueError, match="variant must be dense for the autodiff engine but got lazy: aut"):
        fit(new_sae(), source(), config(engine="autodiff", optimizer=lazy))
    with pytest.raises(
        ValueError, match="variant must be dense for a module or loss of your own but got lazy"
    ):
        fit(new_sae(), source(), config(optimizer=lazy), loss=lambda x, x_recon, z, step: x_recon.sum())
    with pytest.raises(ValueError, match=r"\[config\] variant must be dense for lion but got 'lazy'"):
        OptimizerConfig(variant="lazy", name="lion")
    with pytest.raises(
        ValueError, match=r"\[config\] variant must be one of \['dense', 'lazy', 'row_sparse'\]"
    ):
        OptimizerConfig(variant="sparse")


# ---- resuming ----------------------------------------------------------------------------------------------


class StopAt(Callback):
    """Ends the run from a callback after so many steps."""

    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step(self, run: Run) -> None:
        if run.state.step == self.step:
            raise self.error


def chunks() -> Iterator[mx.array]:
    for i in range(40):
        yield mx.array(dictionary_data(200, seed=i).reshape(2, 100, D))


def stream() -> ShuffleBuffer:
    return ShuffleBuffer(chunks(), batch_size=64, capacity=1000, seed=3)


@pytest.mark.parametrize("make_source", [source, stream])
@pytest.mark.parametrize("stop", [1, 20, 33])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, make_source: Any, stop: int) -> None:
    """Bit for bit: parameters, moments, counters, history, with AuxK at work and through a new process's
    objects.
    """
    settings = config(loss=LossConfig(dead_after=128, k_aux=6))
    whole = fit(half_dead(new_sae()), make_source(), settings)
    assert any(r.get("auxk", 0) > 0 for r in whole.history)
    with pytest.raises(KeyboardInterrupt):
        fit(half_dead(new_sae()), make_source(), settings, callbacks=[StopAt(stop)], checkpoint_dir=tmp_path)
    assert [p.name for p in checkpoints(tmp_path)][-1] == f"step_{stop:08d}"
    # The SAE handed in no longer matters, nor what was left in MLX's random state.
    mx.random.seed(123)
    again = SAE(D, D_SAE, k=K, seed=77)
    resumed = fit(again, make_source(), settings, checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(resumed.sae), weights(whole.sae))
    for (name, a), (other, b) in zip(
        tree_flatten(whole.state.arrays), tree_flatten(resumed.state.arrays), strict=True
    ):
        assert name == other
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=name)
    assert timeless(whole.history) == timeless(resumed.history)


def test_resume_before_the_first_checkpoint_and_after_the_end(tmp_path: Path) -> None:
    fresh = fit(new_sae(), source(), config(), checkpoint_dir=tmp_path, resume=True)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = fit(new_sae(), source(), config(), checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(fresh.sae), weights(again.sae))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == files
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000040", "step_00000060"]


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(new_sae(), source(), config(), callbacks=[StopAt(5)], checkpoint_dir=tmp_path)
    other = config(optimizer=OptimizerConfig(learning_rate=1e-4))
    with pytest.raises(
        ValueError, match=r"\[resume\] optimizer\.learning_rate must be 0\.003 as in the checkpoint"
    ):
        fit(new_sae(), source(), other, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"\[resume\] .* must be .* for this SAE but the checkpoint has"):
        fit(SAE(D, 50, k=K), source(), config(), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"\[ArraySource\] to resume, seed must be 0 but got 1"):
        fit(new_sae(), source(seed=1), config(), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"\[fit\] checkpoint_dir must be given to resume"):
        fit(new_sae(), source(), config(), resume=True)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    fit(new_sae(), source(), config(), checkpoint_dir=tmp_path)
    last = checkpoints(tmp_path)[-1]
    raw = (last / "state.safetensors").read_bytes()
    (last / "state.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"state\.safetensors must be a whole safetensors file"):
        fit(new_sae(), source(), config(), checkpoint_dir=tmp_path, resume=True)
    (last / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json must be JSON but is damaged"):
        fit(new_sae(), source(), config(), checkpoint_dir=tmp_path, resume=True)
    (last / "state.json").write_text('{"format_version": 7}')
    with pytest.raises(ValueError, match=r"must have format_version 1 but has 7"):
        fit(new_sae(), source(), config(), checkpoint_dir=tmp_path, resume=True)


def test_failing_checkpoint_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit(new_sae(), source(), config(), checkpoint_dir=tmp_path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000020"]
    resumed = fit(new_sae(), source(), config(), checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(resumed.sae), weights(fit(new_sae(), source(), config()).sae))


# ---- stopping ----------------------------------------------------------------------------------------------


class Spoilt:
    """Batches of which one holds a bad value."""

    def __init__(self, at: int, value: float):
        self.at, self.value = at, value

    def __iter__(self) -> Iterator[mx.array]:
        for i in range(60):
            x = dictionary_data(64, seed=i)
            if i == self.at:
                x[3, 5] = self.value
            yield mx.array(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 33, 40, 59])
def test_bad_activations_stop_the_run(tmp_path: Path, at: int, value: float) -> None:
    sae = new_sae()
    with pytest.raises(NonFiniteError, match=rf"\[fit\] activations must be finite but batch {at} ") as error:
        fit(sae, Spoilt(at, value), config(), checkpoint_dir=tmp_path)
    assert error.value.step == at
    saved = checkpoints(tmp_path)
    assert [p.name for p in saved] == {0: [], 33: ["step_00000020"]}.get(
        at, ["step_00000020", "step_00000040"]
    )
    assert (str(saved[-1]) if saved else "there is no checkpoint") in str(error.value)
    # The weights are those from just before the bad batch, bit for bit.
    if at:
        clean = new_sae()
        with pytest.raises(KeyboardInterrupt):
            fit(clean, Spoilt(-1, 0.0), config(), callbacks=[StopAt(at)])
        assert_same_bits(weights(sae), weights(clean))
    assert all(np.isfinite(a).all() for a in weights(sae).values())


@pytest.mark.parametrize("engine", ["autodiff", "fused"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", [0, 1])
def test_bad_activations_of_a_transcoder_stop_the_run(field: int, value: float, engine: str) -> None:
    """Also where the bad coordinate of ``x`` pushes every pre-activation down and the loss stays finite."""
    coder = new_sae(d_out=5)
    coder.W_enc = mx.where(mx.arange(D)[:, None] == 5, -mx.abs(coder.W_enc), coder.W_enc)
    batches = []
    for i in range(6):
        pair = [dictionary_data(64, seed=i), np.ones((64, 5), np.float32)]
        if i == 4:
            pair[field][3, (5, 2)[field]] = value
        batches.append(tuple(mx.array(a) for a in pair))
    start = weights(coder)
    with pytest.raises(NonFiniteError, match=r"\[fit\] activations must be finite but batch 4 ") as error:
        fit(coder, batches, config(engine=engine, sample_size=64))
    assert error.value.step == 4
    assert all(np.isfinite(a).all() for a in weights(coder).values())
    assert (weights(coder)["encoder.weight"] != start["encoder.weight"]).any()


def test_a_sum_that_overflows_is_no_failure() -> None:
    """Rows of the input so large that their sum is not finite, and a loss that is."""
    coder = new_sae(d_out=5)
    coder.W_enc = mx.zeros((D, D_SAE))
    settings = config(engine="fused", normalize="none", loss=LossConfig(auxk=None))
    engine = make_engine("fused", coder, settings.loss.build(coder), settings)
    x, y = mx.full((64, D), 3e38), mx.random.normal((64, 5), key=mx.random.key(0))
    arrays = arrays_of(coder, engine, mx.zeros(D_SAE, mx.int32))
    new, metrics = engine.step(arrays, x, y, lr=1e-3, step=0, auxk=False)
    assert new["failed"].tolist() == [-1, 0]
    assert np.isfinite(metrics["loss"].item())
    assert mx.abs(new["params"]["decoder"]["bias"]).max().item() > 0


def test_loss_that_overflows_stops_the_run() -> None:
    sae = new_sae()
    loss = L.Loss({"mse": (1.0, L.mse)}, terms={"wild": (1.0, lambda f: mx.exp(200 * f.code.values.max()))})
    with pytest.raises(NonFiniteError, match=r"\[fit\] loss must be finite but batch 0 "):
        fit(sae, source(), config(), loss=loss)
    assert all(np.isfinite(a).all() for a in weights(sae).values())


def test_interrupt_from_a_callback_leaves_a_checkpoint_and_the_weights(tmp_path: Path) -> None:
    sae, seen = new_sae(), []

    class Watch(Callback):
        def on_end(self, run: Run) -> None:
            seen.append(run.state.step)

    with pytest.raises(KeyboardInterrupt):
        fit(sae, source(), config(), callbacks=[StopAt(27), Watch()], checkpoint_dir=tmp_path)
    assert seen == [27]
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000020", "step_00000027"]
    fresh = new_sae()
    with pytest.raises(KeyboardInterrupt):
        fit(fresh, source(), config(), callbacks=[StopAt(27)])
    assert_same_bits(weights(sae), weights(fresh))


def test_sigint_waits_for_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    class Press(Callback):
        def on_log(self, run: Run, record: dict) -> None:
            if run.state.step == 30:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(new_sae(), source(), config(), callbacks=[Press()], checkpoint_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path)[-1].name == "step_00000030"
    resumed = fit(new_sae(), source(), config(), checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(resumed.sae), weights(fit(new_sae(), source(), config()).sae))


def test_outside_the_main_thread() -> None:
    """No signal handler may be set there."""
    found = {}
    thread = threading.Thread(target=lambda: found.update(weights(fit(new_sae(), source(), config()).sae)))
    thread.start()
    thread.join()
    assert_same_bits(found, weights(fit(new_sae(), source(), config()).sae))


# ---- watching, files, bad input ----------------------------------------------------------------------------


def test_history_and_callbacks() -> None:
    calls: list[str] = []

    class Watch(Callback):
        def on_begin(self, run: Run) -> None:
            calls.append("begin")

        def on_step(self, run: Run) -> None:
            calls.append("step")

        def on_log(self, run: Run, record: dict) -> None:
            calls.append("log")

        def on_end(self, run: Run) -> None:
            calls.append("end")

    result = fit(new_sae(), source(), config(), callbacks=[Watch()])
    assert calls[0] == "begin"
    assert calls[-1] == "end"
    assert (calls.count("step"), calls.count("log")) == (60, 6)
    assert [r["step"] for r in result.history] == [10, 20, 30, 40, 50, 60]
    assert {"loss", "fvu", "l0", "dead_fraction", "lr", "tokens", "tokens_per_s"} <= result.history[0].keys()
    assert json.loads(json.dumps(result.history)) == result.history


def test_every_callback_is_told_of_the_end() -> None:
    told = []

    class Tells(Callback):
        def __init__(self, name: str):
            self.name = name

        def on_end(self, run: Run) -> None:
            told.append(self.name)
            raise RuntimeError(self.name)

    sae = new_sae()
    before = weights(sae)
    with pytest.raises(RuntimeError, match="second"):
        fit(sae, source(), config(total_tokens=128), callbacks=[Tells("first"), Tells("second")])
    assert told == ["first", "second"]
    assert not np.array_equal(weights(sae)["encoder.weight"], before["encoder.weight"])


def test_export_in_mid_run_is_the_sae_of_that_moment() -> None:
    exported = {}

    class Export(Callback):
        def on_step(self, run: Run) -> None:
            if run.state.step == 30:
                exported["sae"] = run.export()

    sae = new_sae()
    start = weights(sae)

    class Untouched(Callback):
        def on_step(self, run: Run) -> None:
            if run.state.step == 30:
                assert_same_bits(weights(run.sae), start)

    fit(sae, source(), config(), callbacks=[Export(), Untouched()])
    stopped = new_sae()
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, source(), config(), callbacks=[StopAt(30)])
    assert_same_bits(weights(exported["sae"]), weights(stopped))


def test_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    fit(new_sae(), source(), config())
    assert capfd.readouterr() == ("", "")
    fit(new_sae(), source(), config(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err
    assert "tok/s" in err
    assert len(err.splitlines()) == 6  # plain lines where it is no terminal


def test_progress_bar_redraws_one_line_on_a_terminal() -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    fit(new_sae(), source(), config(), callbacks=[ProgressBar(stream)])
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 6


def test_trained_sae_round_trips_through_files(tmp_path: Path) -> None:
    sae = fit(new_sae(), source(), config()).sae
    save(sae, tmp_path)
    again = load(tmp_path)
    assert again.metadata == sae.metadata
    assert_same_bits(weights(again), weights(sae))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"\[fit\] there must be at least one batch but got none"),
        ([mx.zeros((0, D))], r"\[fit\] a batch must have at least one row but got none"),
        ([mx.zeros((4, D + 1))], r"\[fit\] x must have shape \[n, 16\] with n=4 but got \(4, 17\)"),
        ([mx.zeros((4, 2, D))], r"\[fit\] x must have shape"),
        ([mx.zeros((4, D), mx.int32)], r"\[fit\] x must be floating point but got"),
        (
            [(mx.ones((4, D)), mx.ones((5, D)))],
            r"\[fit\] y must have shape \[n, 16\] with n=4 but got \(5, 16\)",
        ),
        (
            [mx.ones((4, D)), mx.ones((4, 3))],
            r"\[fit\] x must have shape \[n, 16\] with n=4 but got \(4, 3\)",
        ),
        ([mx.zeros((4, D))], r"\[fit\] activations must have a positive mean norm"),
    ],
)
def test_bad_data(data: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(new_sae(), data, config(sample_size=4))
