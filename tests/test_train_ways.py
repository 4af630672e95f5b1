"""What a run may be made of: optimisers, gradients, normalisation, modules and losses of one's own, many at once."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxsae import io
from mlxsae import loss as L
from mlxsae.analysis import steer
from mlxsae.data import ArraySource, ShuffleBuffer
from mlxsae.metrics import evaluate
from mlxsae.sae import (
    RULES,
    SAE,
    Activation,
    Crosscoder,
    CrossLayerTranscoder,
    HierarchicalSAE,
    ReLU,
    of_rule,
)
from mlxsae.train import (
    OPTIMIZERS,
    Callback,
    CheckpointCallback,
    CrosscoderConfig,
    CrossLayerConfig,
    EarlyStoppingCallback,
    Job,
    LossConfig,
    NonFiniteError,
    OptimizerConfig,
    ProfiSAETrainer,
    Run,
    SAEConfig,
    TrainConfig,
    TranscoderConfig,
    fit,
    fit_many,
)
from mlxsae.train.config import overruled
from mlxsae.train.gradients import recomputed
from mlxsae.train.optimizers import Signum, split_schedule
from mlxsae.train.randomness import kept_random_state, seed_step
from test_train import D_SAE, D, StopAt, assert_same_bits, config, dictionary_data, new_sae, source, weights

HELD_OUT = dictionary_data(300, seed=5)

# ---- optimisers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_learns_and_resumes(name: str, tmp_path: Path) -> None:
    rate = {"adadelta": 3.0, "adagrad": 0.05, "sgd": 0.3, "muon": 0.02}.get(name, 3e-3)
    o = OptimizerConfig(name=name, learning_rate=rate, betas=(0.9, 0.99))
    settings = config(optimizer=o, loss=LossConfig(auxk=None), engine="auto")
    whole = fit(new_sae(), source(), settings)
    assert whole.sae.metadata["training"]["engine"] == ("fused" if name == "adam" else "autodiff")
    assert whole.history[-1]["fvu"] < 0.9 * whole.history[0]["fvu"]
    with pytest.raises(KeyboardInterrupt):
        fit(new_sae(), source(), settings, callbacks=[StopAt(31)], checkpoint_dir=tmp_path)
    resumed = fit(new_sae(), source(), settings, checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(resumed.sae), weights(whole.sae))


def test_signum_by_hand() -> None:
    optimizer = Signum(0.1, momentum=0.5, weight_decay=0.2)
    w = {"w": mx.array([1.0, -2.0, 3.0])}
    optimizer.init(w)
    w = optimizer.apply_gradients({"w": mx.array([4.0, -4.0, 0.0])}, w)
    np.testing.assert_allclose(np.array(w["w"]), [1 - 0.1 * 1.2, -2 + 0.1 * 1.4, 3 - 0.1 * 0.6], rtol=1e-6)
    w = optimizer.apply_gradients({"w": mx.array([-3.0, 0.0, 0.0])}, w)  # m = (-0.5, -1, 0)
    np.testing.assert_allclose(np.array(w["w"])[0], 0.88 + 0.1 - 0.1 * 0.2 * 0.88, rtol=1e-6)


def test_the_schedule_of_an_optimizer_counts_the_steps_of_the_run(tmp_path: Path) -> None:
    """Also one that branches in Python, and after a resume; the optimiser that was given stays as it was."""

    def rate(step: Any) -> Any:
        return 1e-3 * (step + 1) / 10 if step < 10 else 1e-3 * mx.cos(step / 100)

    optimizer = optim.AdamW(learning_rate=rate, weight_decay=0.01)
    settings = config(log_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(
            new_sae(), source(), settings, optimizer=optimizer, callbacks=[StopAt(7)], checkpoint_dir=tmp_path
        )
    result = fit(new_sae(), source(), settings, optimizer=optimizer, checkpoint_dir=tmp_path, resume=True)
    wanted = [1e-3 * (i + 1) / 10 if i < 10 else 1e-3 * math.cos(i / 100) for i in range(60)]
    np.testing.assert_allclose([r["lr"] for r in result.history], wanted, rtol=1e-5)
    assert optimizer._schedulers
    # A constant one follows a schedule that is given beside it.
    half = fit(
        new_sae(), source(), settings, optimizer=optim.SGD(0.25), schedule=lambda step: 0.5 ** (step // 30)
    )
    assert [r["lr"] for r in half.history] == [0.25] * 30 + [0.125] * 30
    # Parts of a MultiOptimizer keep their own rates.
    multi = optim.MultiOptimizer([optim.SGD(0.0), optim.SGD(0.1)], [lambda path, _: "encoder" in path])
    sae = new_sae()
    before = weights(sae)
    fit(sae, source(), config(normalize="none"), optimizer=multi)
    np.testing.assert_array_equal(weights(sae)["encoder.weight"], before["encoder.weight"])
    assert (weights(sae)["decoder.weight"] != before["decoder.weight"]).any()
    assert split_schedule(multi)[1](3) == 0.0


def test_constant_and_stepwise_schedules() -> None:
    shapes = {}
    for name, o in {
        "constant": OptimizerConfig(learning_rate=1e-3, warmup=5, shape="constant", decay=0.5),
        "steps": OptimizerConfig(learning_rate=1e-3, warmup=6, decay=12),
        "fractions": OptimizerConfig(learning_rate=1e-3, warmup=0.1, decay=0.2),
    }.items():
        shapes[name] = [r["lr"] for r in fit(new_sae(), source(), config(log_every=1, optimizer=o)).history]
    np.testing.assert_allclose(shapes["constant"], [1e-3 * min(1, (i + 1) / 5) for i in range(60)], rtol=1e-5)
    assert shapes["steps"] == shapes["fractions"]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0])
def test_a_schedule_that_goes_wrong_is_named(factor: float) -> None:
    """Before it makes the weights NaN, which no guard of the loss would see in time."""
    sae = new_sae()
    before = weights(sae)
    with pytest.raises(
        ValueError, match=rf"rate must be finite and at least 0 but is {factor * 3e-3} in step 5"
    ):
        fit(sae, source(), config(), schedule=lambda step: factor if step == 5 else 1.0)
    after = weights(sae)
    assert all(np.isfinite(a).all() for a in after.values())
    assert (after["encoder.weight"] != before["encoder.weight"]).any()


# ---- gradients ---------------------------------------------------------------------------------------------


def test_accumulation_takes_the_step_of_the_large_batch() -> None:
    """For a loss that is a mean over rows; rows and steps are counted as those of the large batch."""
    loss = LossConfig("mse", auxk=None)
    large = config(loss=loss, engine="autodiff", batch_size=96, total_tokens=3840, log_every=1)
    parts = replace(large, batch_size=24, gradient_accumulation_steps=4)
    a = fit(new_sae(), ArraySource(dictionary_data(), batch_size=96), large)
    b = fit(new_sae(), ArraySource(dictionary_data(), batch_size=24), parts)
    assert (b.state.step, b.state.tokens) == (a.state.step, a.state.tokens) == (40, 3840)
    for name, w in weights(a.sae).items():
        np.testing.assert_allclose(weights(b.sae)[name], w, rtol=1e-3, atol=1e-5, err_msg=name)
    # Counted from the end of the part in which a latent fired, not of the whole step.
    later = np.array(b.state.tokens_since_fired) - np.array(a.state.tokens_since_fired)
    assert ((later >= 0) & (later < 96)).all()
    np.testing.assert_allclose([r["loss"] for r in a.history], [r["loss"] for r in b.history], rtol=1e-4)
    # A stream that ends within a step: its rows still count as a mean.
    short = fit(new_sae(), [mx.array(dictionary_data(n)) for n in (24, 24, 7)], replace(parts, sample_size=8))
    assert (short.state.step, short.state.tokens) == (1, 55)


def test_accumulation_holds_one_part_at_a_time() -> None:
    peaks = {}
    for parts in (1, 8):
        module = Wide(D, 40_000)
        x = [mx.random.normal((64 // parts, D), key=mx.random.key(i)) for i in range(2 * parts)]
        mx.eval(module.parameters(), x)
        settings = own(batch_size=64 // parts, gradient_accumulation_steps=parts, total_tokens=128)
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        fit(module, x, settings)
        peaks[parts] = mx.get_peak_memory() - base
    latents = 64 * 40_000 * 4
    assert peaks[8] < peaks[1] - latents


def test_mixed_precision_computes_low_and_keeps_masters() -> None:
    seen = []

    def loss(x: mx.array, x_recon: mx.array, z: mx.array, step: int) -> mx.array:
        seen.append((x.dtype, x_recon.dtype, z.dtype))
        return mx.square(x - x_recon.astype(mx.float32)).sum(axis=-1).mean()

    result = fit(Wide(D, 64), source(), own(mixed_precision=True), loss=loss)
    assert set(seen) == {(mx.float32, mx.bfloat16, mx.bfloat16)}
    assert {a.dtype for _, a in tree_flatten(result.state.params)} == {mx.float32}
    # Masters take steps far below bfloat16's resolution.
    still = fit(
        Wide(D, 64), source(), own(mixed_precision=True, optimizer=OptimizerConfig(learning_rate=1e-6))
    )
    moved = np.abs(weights(still.sae)["encoder.weight"] - weights(Wide(D, 64))["encoder.weight"]).max()
    assert 1e-6 < moved < 1e-3
    sae = new_sae()
    low = fit(sae, source(), config(mixed_precision=True, total_tokens=400 * 64))
    assert sae.metadata["training"]["engine"] == "autodiff"
    full = fit(new_sae(), source(), config(total_tokens=400 * 64))
    assert low.history[-1]["fvu"] < 1.5 * full.history[-1]["fvu"] + 0.02


@pytest.mark.parametrize("architecture", sorted(RULES))
def test_every_rule_trains_in_mixed_precision(architecture: str) -> None:
    sae = SAEConfig(d_sae=D_SAE, architecture=architecture, k=4).build(D)
    history = fit(sae, source(), config(mixed_precision=True, engine="auto")).history
    assert history[-1]["fvu"] < history[0]["fvu"]
    assert all(a.dtype == mx.float32 for _, a in tree_flatten(sae.parameters()))


def test_checkpointing_saves_memory_and_changes_no_bit() -> None:
    found = {}
    for active in (False, True):
        module = Deep(D, 500, layers=12)
        x = mx.random.normal((2048, D), key=mx.random.key(0))
        mx.eval(module.parameters(), x)
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        fit(module, [x], own(batch_size=2048, total_tokens=2048, gradient_checkpointing=active))
        found[active] = mx.get_peak_memory() - base, weights(module)
    assert_same_bits(found[True][1], found[False][1])
    assert found[True][0] < found[False][0] - 8 * 2048 * 500 * 4
    layer = Deep(D, 8, layers=1)
    kind = type(layer.body.layers[0])
    with recomputed(layer):
        assert isinstance(layer.body.layers[0], kind)
        assert type(layer.body.layers[0]) is not kind
    assert type(layer.body.layers[0]) is kind


@pytest.mark.parametrize("tied", [False, True])
def test_checkpointing_changes_no_bit_of_an_sae(tied: bool) -> None:
    found = []
    for active in (False, True):
        sae = new_sae(tied=tied)
        settings = config(total_tokens=3 * 64, gradient_checkpointing=active, engine="autodiff")
        found.append(weights(fit(sae, source(), settings).sae))
    assert_same_bits(*found)


def test_what_is_computed_twice_draws_the_same_mask() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.drop = mx.ones(50), nn.Dropout(0.5)

        def __call__(self, x: mx.array) -> mx.array:
            return self.drop(x * self.scale)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Noisy(), Noisy()

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return self.a(x), self.b(x)

    module, x = Two(), mx.random.uniform(1, 2, (8, 50), key=mx.random.key(0))
    with kept_random_state():
        seed_step(0, 0)

        def loss(params: Any) -> tuple[mx.array, Any]:
            module.update(params)
            with recomputed(module):
                a, b = module(x)
            return a.sum() + b.sum(), (a, b)

        (_, outputs), gradients = mx.value_and_grad(loss)(module.parameters())
    for name, out in zip("ab", outputs, strict=True):
        np.testing.assert_allclose(np.array(gradients[name]["scale"]), np.array(out.sum(axis=0)), rtol=1e-5)
    assert (np.array(outputs[0]) != np.array(outputs[1])).any()


# ---- modules and losses of one's own -----------------------------------------------------------------------


class Wide(nn.Module):
    """The plainest autoencoder, with nothing of ours."""

    def __init__(self, d: int, d_sae: int, noisy: bool = False):
        super().__init__()
        with kept_random_state():
            mx.random.seed(1)
            self.encoder, self.decoder = nn.Linear(d, d_sae), nn.Linear(d_sae, d)
        self.drop = nn.Dropout(0.3 if noisy else 0.0)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        z = nn.relu(self.encoder(self.drop(x)))
        return self.decoder(z), z


class Deep(nn.Module):
    def __init__(self, d: int, width: int, layers: int):
        super().__init__()
        with kept_random_state():
            mx.random.seed(1)
            pieces = [Block(width) for _ in range(layers)]
            self.body = nn.Sequential(*pieces)
            self.inward, self.outward = nn.Linear(d, width), nn.Linear(width, d)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        z = self.body(self.inward(x))
        return self.outward(z), z


class Block(nn.Module):
    """Keeps much between forward and backward, by no weight of its own size."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = mx.ones(width)

    def __call__(self, x: mx.array) -> mx.array:
        return x + mx.sin(mx.tanh(mx.exp(mx.sin(x * self.scale) - 1) * self.scale))


def own(**changes: Any) -> TrainConfig:
    return config(
        **({"normalize": "none", "b_dec_init": "keep", "loss": LossConfig(dead_after=640)} | changes)
    )


def hoyer(x: mx.array, x_recon: mx.array, z: mx.array, step: int) -> tuple[mx.array, dict]:
    """Branches on the step and returns Python numbers, as people do."""
    recon = mx.mean((x - x_recon) ** 2)
    weight = 1e-3 if step < 20 else 1e-3 * float(mx.log(mx.array(1 + step / 20)))
    squared = mx.square(mx.abs(z).sum(axis=-1)) / (mx.square(z).sum(axis=-1) + 1e-8)
    return recon + weight * squared.mean(), {"recon": recon, "hoyer": squared.mean(), "lambda": weight}


def test_a_module_and_a_loss_of_ones_own(tmp_path: Path) -> None:
    options = {"loss": hoyer, "optimizer": optim.AdamW(3e-3), "preprocess": noisy}
    settings = own(total_tokens=120 * 64, validate_every=30, optimizer=OptimizerConfig(max_grad_norm=1.0))
    whole = fit(Wide(D, 40, True), source(), settings, validation=dictionary_data(300, seed=5), **options)
    first, last = whole.history[0], whole.history[-1]
    assert last["recon"] < 0.5 * first["recon"]
    assert {"loss", "hoyer", "lambda", "l0", "dead_fraction", "lr", "grad_norm"} <= last.keys()
    assert last["lambda"] == pytest.approx(1e-3 * math.log(1 + 119 / 20), rel=1e-4)
    assert [v["step"] for v in whole.validations] == [30, 60, 90, 120]
    assert {"val_loss", "val_recon", "val_hoyer", "val_l0", "val_dead_fraction"} <= whole.validations[
        0
    ].keys()
    # Dropout and noise are drawn again as they were.
    with pytest.raises(KeyboardInterrupt):
        fit(Wide(D, 40, True), source(), settings, callbacks=[StopAt(57)], checkpoint_dir=tmp_path, **options)
    mx.random.seed(77)
    resumed = fit(Wide(D, 40, True), source(), settings, checkpoint_dir=tmp_path, resume=True, **options)
    assert_same_bits(weights(resumed.sae), weights(whole.sae))


def noisy(x: mx.array) -> mx.array:
    return x + 0.01 * mx.random.normal(x.shape)


def test_a_loss_of_ones_own_on_our_sae() -> None:
    sae = new_sae()
    result = fit(sae, source(), config(total_tokens=200 * 64), loss=hoyer)
    assert sae.metadata["training"]["engine"] == "module"
    assert result.history[-1]["recon"] < 0.4 * result.history[0]["recon"]
    np.testing.assert_allclose(np.linalg.norm(np.array(sae.W_dec), axis=1), 1, atol=1e-5)
    assert result.history[-1]["l0"] <= 4


def squares(x: mx.array, x_recon: mx.array, z: mx.array, step: int) -> mx.array:
    return mx.square(x - x_recon).sum(axis=-1).mean() + 1e-3 * z.sum(axis=-1).mean()


@pytest.mark.parametrize("architecture", sorted(RULES))
def test_a_loss_of_ones_own_trains_all_of_every_rule(architecture: str, tmp_path: Path) -> None:
    """As our own losses do: thresholds move and stay in range, a BatchTopK ends with one, the SAE can be saved."""
    sae = SAEConfig(d_sae=D_SAE, architecture=architecture, k=4).build(D)
    before = weights(sae)
    settings = config(total_tokens=60 * 64, wake=0.0, log_every=10)
    history = fit(sae, source(), settings, loss=squares).history
    assert history[-1]["loss"] < history[0]["loss"]
    # A gate has no gradient but from terms of its own.
    blind = {"encoder.bias"} if architecture == "gated" else set()
    after = weights(sae)
    assert {name for name in after if np.array_equal(after[name], before[name])} <= blind
    if "rule.threshold" in after:
        assert after["rule.threshold"].min() >= 0
    io.save(sae, tmp_path)
    np.testing.assert_array_equal(io.load(tmp_path)(mx.array(HELD_OUT)), sae(mx.array(HELD_OUT)))
    if architecture == "batchtopk":
        assert history[-1]["threshold"] > 0
        assert evaluate(sae, [mx.array(HELD_OUT)])["l0"] == pytest.approx(4, rel=0.25)


def test_a_loss_of_ones_own_sees_the_gate() -> None:
    sae = SAEConfig(d_sae=D_SAE, architecture="gated").build(D)

    def loss(x: mx.array, x_recon: mx.array, z: mx.array, step: int, extra: tuple = ()) -> mx.array:
        (gate,) = extra
        return squares(x, x_recon, z, step) + 1e-2 * nn.relu(gate).sum(axis=-1).mean()

    before = weights(sae)["encoder.bias"]
    fit(sae, source(), config(), loss=loss)
    assert (weights(sae)["encoder.bias"] < before).mean() > 0.9


@pytest.mark.parametrize("fn", [nn.relu, nn.gelu, nn.GELU()], ids=["relu", "gelu", "GELU"])
def test_functions_that_mlx_has_compiled_are_activations(fn: Any) -> None:
    history = fit(SAE(D, 40, rule=Activation(fn), seed=0), source(), config(log_every=30)).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert CrossLayerTranscoder(8, 2, 20, rule=Activation(fn)).rule.layers[1].fn is not None

    class Own(Wide):
        def __init__(self) -> None:
            super().__init__(D, 40)
            self.fn = fn

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            z = self.fn(self.encoder(x))
            return self.decoder(z), z

    assert fit(Own(), source(), own(total_tokens=128)).state.step == 2


def test_a_run_whose_data_end_says_so_and_has_its_last_record(tmp_path: Path) -> None:
    batches = [mx.array(dictionary_data(64, seed=i)) for i in range(3)]
    settings = own(total_tokens=10 * 64, log_every=100, validate_every=100)
    result = fit(Wide(D, 40), batches, settings, validation=HELD_OUT, checkpoint_dir=tmp_path)
    assert result.stopped == "the data ended after 3 of 10 steps"
    assert [r["step"] for r in result.history] == [r["step"] for r in result.validations] == [3]
    again = fit(Wide(D, 40), batches, settings, validation=HELD_OUT, checkpoint_dir=tmp_path, resume=True)
    assert (again.state.step, again.stopped, again.history) == (3, result.stopped, result.history)
    assert not fit(Wide(D, 40), batches, own(total_tokens=3 * 64)).stopped


def test_data_that_end_just_at_a_checkpoint_leave_the_end_in_it(tmp_path: Path) -> None:
    batches = [mx.array(dictionary_data(64, seed=i)) for i in range(3)]
    settings = own(total_tokens=10 * 64, log_every=100, checkpoint_every=3)
    found = [
        fit(Wide(D, 40), batches, settings, validation=HELD_OUT, checkpoint_dir=tmp_path, resume=True)
        for _ in range(2)
    ]
    assert found[1].stopped == "the data ended after 3 of 10 steps"
    assert len(found[0].history) == len(found[0].validations) == 1
    assert (found[1].history, found[1].validations) == (found[0].history, found[0].validations)


@pytest.mark.parametrize("buffered", [False, True])
def test_data_that_end_just_at_a_resampling_end_in_order(buffered: bool) -> None:
    batches = [mx.array(dictionary_data(64, seed=i)) for i in range(4)]
    data: Any = ShuffleBuffer(batches, batch_size=64, capacity=64) if buffered else batches
    settings = config(total_tokens=20 * 64, resample_every=4, sample_size=64, loss=LossConfig(dead_after=1))
    sae = SAE(D, D_SAE, k=1, seed=0)
    assert fit(sae, data, settings).stopped == "the data ended after 4 of 20 steps"


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """The root of a latent that is 0: a finite loss, and no gradient."""
    module = Wide(D, 40)
    before = weights(module)

    def rooted(x: mx.array, x_recon: mx.array, z: mx.array, step: int) -> mx.array:
        return mx.square(x - x_recon).sum(axis=-1).mean() + mx.sqrt(z).sum(axis=-1).mean()

    with pytest.raises(NonFiniteError, match="the gradient of the loss must be finite but batch 0"):
        fit(module, source(), own(), loss=rooted)
    assert_same_bits(weights(module), before)
    sae = SAE(D, D_SAE, rule=ReLU(), seed=0)
    term = L.Loss({}, terms={"roots": (1.0, lambda forward: mx.sqrt(forward.code.values).sum())})
    with pytest.raises(NonFiniteError, match="the gradient of the loss must be finite but batch 0"):
        fit(sae, source(), config(), loss=term)
    assert all(np.isfinite(w).all() for w in weights(sae).values())


def test_silence_of_a_module_counts_no_further_than_it_can() -> None:
    class Late(Callback):
        def on_begin(self, run: Run) -> None:
            run.state = replace(run.state, tokens_since_fired=mx.full((40,), 2**31 - 10, mx.int32))

    module = Wide(D, 40)
    module.encoder.bias = mx.full((40,), -1e6)
    result = fit(module, source(), own(total_tokens=128), callbacks=[Late()])
    assert result.state.tokens_since_fired.tolist() == [2**31 - 1] * 40
    assert result.history[-1]["dead_fraction"] == 1


@pytest.mark.parametrize("engine", ["fused", "autodiff"])
def test_nothing_is_dead_before_silence_can_be_counted_so_far(engine: str) -> None:
    loss = LossConfig(dead_after=10**12)
    history = fit(new_sae(), source(), config(engine=engine, loss=loss, total_tokens=20 * 64)).history
    assert history[-1]["dead_fraction"] == 0


def test_a_metric_that_is_nan_keeps_no_run_from_its_checkpoint(tmp_path: Path) -> None:
    def odd(x: mx.array, x_recon: mx.array, z: mx.array, step: int) -> Any:
        return mx.square(x - x_recon).mean(), {"odd": mx.array(math.nan)}

    settings = own(total_tokens=4 * 64, checkpoint_every=2, log_every=1)
    found = [
        fit(Wide(D, 40), source(), settings, loss=odd, checkpoint_dir=tmp_path, resume=True) for _ in range(2)
    ]
    assert [len(f.history) for f in found] == [4, 4]
    assert math.isnan(found[1].history[-1]["odd"])


def test_k_is_annealed_from_no_more_than_each_level_and_layer_has() -> None:
    settings = config(total_tokens=640, k_start=100, k_warmup=0.5, log_every=1)
    x = dictionary_data()
    found = fit(HierarchicalSAE(D, 32, 32, k_coarse=1, k_fine=15, seed=0), source(), settings).history
    assert found[0]["l0"] > found[-1]["l0"]
    both = np.concatenate([x, x], axis=1)
    data = ArraySource(both, both, batch_size=64)
    found = fit(CrossLayerTranscoder(D, 2, 32, k=4, seed=0), data, settings).history
    assert found[0]["l0"] > 2 * found[-1]["l0"]


def test_k_is_annealed_under_a_loss_of_ones_own() -> None:
    settings = config(total_tokens=20 * 64, k_start=12, k_warmup=10, log_every=1)
    l0 = [r["l0"] for r in fit(new_sae(), source(), settings, loss=squares).history]
    assert l0[0] > 2 * l0[-1]
    assert l0[-1] <= 4
    with pytest.raises(ValueError, match="k_start must be None for a module of your own but got k_start=12"):
        fit(Wide(D, 40), source(), own(k_start=12))


def test_further_outputs_reach_the_loss() -> None:
    class Gated(Wide):
        def __call__(self, x: mx.array) -> Any:
            x_recon, z = super().__call__(x)
            return x_recon, z, mx.sigmoid(z), "name"

    def loss(x: mx.array, x_recon: mx.array, z: mx.array, step: int, extra: tuple = ()) -> Any:
        gate, name = extra
        assert name == "name"
        return mx.square(x - x_recon).mean() + 1e-3 * gate.mean(), {"gate": gate.mean()}

    assert fit(Gated(D, 24), source(), own(), loss=loss).history[-1]["gate"] > 0.4


def test_modules_that_do_not_fit_are_named() -> None:
    class Lone(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"\[fit\] the module must return \(x_recon, z\) but returned array"):
        fit(Lone(D, D), source(), own())
    with pytest.raises(ValueError, match=r"normalize must be none and b_dec_init keep for a module"):
        fit(Wide(D, 8), source(), config())
    with pytest.raises(
        ValueError, match="decoder_init must be None or keep for a module of your own but got"
    ):
        fit(Wide(D, 8), source(), own(decoder_init="pca"))
    with pytest.raises(ValueError, match=r"\[fit\] loss must be a function \(x, x_recon, z, step\)"):
        fit(Wide(D, 8), source(), own(), loss=L.Loss({"mse": (1.0, L.mse)}))
    with pytest.raises(
        ValueError, match="engine must be autodiff for an optimizer of your own but got fused"
    ):
        fit(new_sae(), source(), config(engine="fused"), optimizer=optim.SGD(0.1))
    with pytest.raises(ValueError, match="but got fused: the optimizer is lion"):
        fit(new_sae(), source(), config(engine="fused", optimizer=OptimizerConfig(name="lion")))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x, y, z, step: None, "returned total of NoneType"),
        (lambda x, y, z, step: mx.zeros(3), "returned total of (3,)"),
        (lambda x, y, z, step: (y.mean(), 5), "returned int after total"),
        (lambda x, y, z, step: (y.mean(), {}, 1), "and 2 more"),
        (lambda x, y, z, step: (y.mean(), {"v": mx.zeros(3)}), "returned v of shape (3,)"),
        (lambda x, y, z, step: (y.mean(), {"step": y.mean()}), "returned the name step, which the run uses"),
    ],
)
def test_a_loss_that_returns_something_else_is_told(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"\[fit\] loss must return .*" + re.escape(message)):
        fit(Wide(D, 8), source(), own(), loss=made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "[fit] optimizer must be one of MLX's but got 'adam'"),
        ({"loss_fn": 5}, "[fit] loss must be a function (x, x_recon, z, step) but got int"),
        ({"preprocess_fn": 5}, "preprocess_fn must be a function but got int"),
        ({"preprocess_fn": lambda x: None}, "preprocess must return an array [1000, d] but returned None"),
        (
            {"preprocess_fn": lambda x: x[:0]},
            "preprocess must return an array [1000, d] but returned (0, 16)",
        ),
        ({"num_steps": 2.5}, "num_steps must be at least 1, an int, but got 2.5"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"sae": None}, "[fit] sae must be an nn.Module but got NoneType"),
        ({"dataset": 5}, "[fit] data must be an ActivationSource, such as"),
        ({"dataset": [[1.0]]}, "a batch must be an array [n, d] or a tuple of them but got list"),
        ({"validation_dataset": 5}, "validation must be an array, a pair of them, or batches but got int"),
    ],
)
def test_what_a_trainer_of_ones_own_cannot_use_is_told(options: dict, message: str) -> None:
    given = {"sae": Wide(D, 8), "dataset": dictionary_data(1000), "num_steps": 2, "batch_size": 64}
    with pytest.raises(ValueError, match=re.escape(message)):
        ProfiSAETrainer().train(**given | options)


def test_what_fit_cannot_use_is_told() -> None:
    with pytest.raises(ValueError, match="config must be a TrainConfig but got dict"):
        fit(new_sae(), source(), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data must be an ActivationSource, .* but got ndarray"):
        fit(new_sae(), dictionary_data(100), config())
    with pytest.raises(ValueError, match="jobs must be of Job but got SAE"):
        fit_many([new_sae()], source())  # type: ignore[list-item]
    for make in (
        lambda: EarlyStoppingCallback(patience=2.5),  # type: ignore[arg-type]
        lambda: EarlyStoppingCallback(min_delta=-1),
        lambda: EarlyStoppingCallback(metric=None),  # type: ignore[arg-type]
        lambda: CheckpointCallback(save_every=2.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"must .* but got"):
            make()


def test_folders_that_cannot_be_written_are_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen = Wide(D, 8)
    for options in (
        {"checkpoint_dir": tmp_path / "file"},
        {"callbacks": [CheckpointCallback(save_every=2, directory=tmp_path / "file")]},
    ):
        steps: list[int] = []
        with pytest.raises(FileExistsError):
            fit(seen, source(), own(), preprocess=lambda x, steps=steps: steps.append(1) or x, **options)
        assert len(steps) == 1  # the sample's


def test_batches_may_be_numpy() -> None:
    x = dictionary_data(300)
    batches, made = [x[:100], x[100:200], x[200:]], []
    for cast in (np.asarray, mx.array):
        sae = new_sae()
        fit(sae, [cast(b) for b in batches], config(batch_size=100), validation=[cast(b) for b in batches])
        made.append(weights(sae))
    assert_same_bits(*made)


# ---- normalisation -----------------------------------------------------------------------------------------


def by_hand(x: np.ndarray, normalize: str, power: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean of ``x`` and the matrix that what is left of it is multiplied by."""
    mean, cov = x.mean(0, dtype=np.float64), np.cov(x.T.astype(np.float64), bias=True)
    if normalize == "mean_std":
        return mean, np.diag(1 / np.sqrt(np.diag(cov)))
    values, axes = np.linalg.eigh(cov)
    matrix = axes @ np.diag(np.maximum(values, 1e-3 * values.max()) ** (-power / 2)) @ axes.T
    return mean, matrix * np.sqrt(len(mean) / np.trace(matrix @ cov @ matrix))


@pytest.mark.parametrize(("normalize", "power"), [("mean_std", 1.0), ("whiten", 1.0), ("whiten", 0.3)])
@pytest.mark.parametrize("d_out", [None, 9])
def test_normalisation_folds_into_the_weights(d_out: int | None, normalize: str, power: float) -> None:
    """The SAE that comes out does on raw activations what the trained one did on normalised ones."""
    rng = np.random.default_rng(2)
    stretch = np.exp(rng.normal(size=D)).astype(np.float32)
    x = dictionary_data() * stretch * 10 + 3 * stretch
    y = None if d_out is None else (np.maximum(x @ rng.normal(size=(D, 9)), 0) + 5).astype(np.float32)
    sae = new_sae(d_out=d_out)
    states = []

    class Keep(Callback):
        def on_step(self, run: Run) -> None:
            states[:] = [run.state]

    settings = config(normalize=normalize, whitening=power, total_tokens=300 * 64, sample_size=6000)
    fit(sae, ArraySource(x, y, batch_size=64), settings, callbacks=[Keep()])
    mean, matrix = by_hand(x, normalize, power)
    inside = new_sae(d_out=d_out)
    inside.update(states[0].params)
    rows = x[:200]
    seen = mx.array(((rows - mean) @ matrix).astype(np.float32))
    a, b = sae.encode(mx.array(rows)), inside.encode(seen)
    np.testing.assert_allclose(np.array(sae.to_dense(a)), np.array(inside.to_dense(b)), rtol=2e-3, atol=5e-4)
    target_mean, target_matrix = by_hand(x if y is None else y, normalize, power)
    wanted = np.array(inside.decode(b)) @ np.linalg.inv(target_matrix) + target_mean
    np.testing.assert_allclose(np.array(sae.decode(a)), wanted, rtol=2e-3, atol=2e-2)
    pair = mx.array(x[:2000]) if y is None else (mx.array(x[:2000]), mx.array(y[:2000]))
    assert evaluate(sae, [pair])["fvu"] < 0.5


@pytest.mark.parametrize("normalize", ["expected_norm", "mean_std", "whiten"])
@pytest.mark.parametrize("d_out", [None, 9])
@pytest.mark.parametrize("architecture", sorted(RULES))
def test_normalisation_folds_into_every_rule(architecture: str, d_out: int | None, normalize: str) -> None:
    """Also into gates that read the input by themselves, and into magnitudes that have a bias of their own."""
    if RULES[architecture].own_sae and d_out is not None:
        pytest.skip("no transcoder has this rule")
    x = dictionary_data() * np.linspace(1, 9, D, dtype=np.float32) + 3
    y = None if d_out is None else np.maximum(x[:, :d_out] - 4, 0) + 1
    rule = SAEConfig(d_sae=D_SAE, architecture=architecture, k=4).build(D).rule
    sae = of_rule(D, D_SAE, rule=rule, seed=0, **({} if d_out is None else {"d_out": d_out}))
    inside: dict[str, mx.array] = {}

    class Keep(Callback):
        def on_end(self, run: Run) -> None:
            rows = run.sample(200)[0]
            with run.current() as working:
                code = working.learn(rows, run.state.rule).code
                inside["acts"] = working.to_dense(code) / run.state.scale[0]
                mx.eval(inside)

    fit(sae, ArraySource(x, y, batch_size=64), config(normalize=normalize), callbacks=[Keep()])
    rows = mx.array(ArraySource(x, batch_size=64).sample(200)[0])
    acts = sae.to_dense(sae.learn(rows, sae.rule.initial_state()).code)
    scale = mx.abs(inside["acts"]).max().item()
    assert scale > 0
    np.testing.assert_allclose(np.array(acts), np.array(inside["acts"]), atol=1e-4 * scale)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "topk_jumprelu", "relu", "gated"])
def test_latents_ranked_by_decoder_norm_come_out_as_they_were_trained(architecture: str) -> None:
    """Thresholds are then measured like the target, and what is used is what was trained."""
    x = dictionary_data()
    y = 7 * x[:, ::-1] + 1
    rule = SAEConfig(d_sae=D_SAE, architecture=architecture, k=4).build(D).rule
    sae = SAE(D, D_SAE, rule=rule, d_out=D, rank_by_decoder_norm=True, seed=0)
    settings = config(normalize_decoder=False, total_tokens=200 * 64)
    record = fit(sae, ArraySource(x, y, batch_size=64), settings, validation=(x[:1000], y[:1000])).validations
    found = evaluate(sae, [(mx.array(x[:1000]), mx.array(y[:1000]))])
    assert found["l0"] == pytest.approx(
        record[-1]["val_l0"], rel=0.1 if architecture == "batchtopk" else 1e-3
    )
    assert found["fvu"] == pytest.approx(record[-1]["val_fvu"], rel=0.1)
    rows = mx.array(x[:50])
    used = sae.to_dense(sae.encode(rows))
    if architecture != "batchtopk":
        learned = sae.to_dense(sae.learn(rows, {}).code)
        np.testing.assert_allclose(np.array(used), np.array(learned), atol=1e-5 * mx.abs(used).max().item())


@pytest.mark.parametrize("decoder_norm", [0.2, 3.0])
@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "gated", "sigmoid_gated"])
def test_a_ranked_start_fires_as_wanted(architecture: str, decoder_norm: float) -> None:
    x = np.concatenate([dictionary_data(), dictionary_data(seed=3)], axis=1)
    rule = SAEConfig(d_sae=128, architecture=architecture, k=8).build(D).rule
    sae = Crosscoder(D, 2, 128, rule=rule, decoder_norm=decoder_norm, seed=0)
    wanted = None if architecture == "jumprelu" else 8.0
    settings = config(total_tokens=64, normalize_decoder=False, loss=LossConfig(target_l0=wanted))
    assert fit(sae, ArraySource(x, batch_size=64), settings).history[0]["l0"] == pytest.approx(8, rel=0.2)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk_jumprelu", "gated", "relu"])
def test_a_ranked_latent_that_writes_nothing_spoils_no_gradient(architecture: str) -> None:
    rule = SAEConfig(d_sae=D_SAE, architecture=architecture, k=4).build(D).rule
    sae = SAE(D, D_SAE, rule=rule, rank_by_decoder_norm=True, seed=0)
    sae.W_dec = sae.W_dec * (mx.arange(D_SAE) > 5)[:, None]
    assert fit(sae, source(), config(normalize_decoder=False)).state.step == 60


@pytest.mark.parametrize("normalize", ["expected_norm", "layer_norm", "mean_std", "whiten"])
@pytest.mark.parametrize("shape", ["topk", "jumprelu", "gated", "sigmoid_gated", "skip", "crosscoder"])
def test_training_goes_on_from_what_a_trained_sae_does(shape: str, normalize: str) -> None:
    """Weights that came out of a run are for raw activations, and so is their ``b_dec``."""
    if normalize == "layer_norm" and shape in ("skip", "crosscoder"):
        pytest.skip("it is not for these")
    x = dictionary_data() * np.linspace(1, 9, D, dtype=np.float32) + 3
    arrays: Any = (x,)
    if shape == "skip":
        arrays = (x, np.maximum(x[:, :9] - 4, 0) + 1)
        sae = SAE(D, D_SAE, k=4, d_out=9, skip=True, seed=0)
    elif shape == "crosscoder":
        arrays = (np.concatenate([x, 5 * x[:, ::-1]], axis=1),)
        sae = Crosscoder(D, 2, D_SAE, k=4, rank_by_decoder_norm=False, seed=0)
    else:
        sae = SAEConfig(d_sae=D_SAE, architecture=shape, k=4).build(D)
    fit(sae, ArraySource(*arrays, batch_size=64), config(normalize=normalize, total_tokens=100 * 64))
    parts = tuple(mx.array(a[:1000]) for a in arrays)
    before = evaluate(sae, [parts if len(parts) > 1 else parts[0]])
    still = OptimizerConfig(learning_rate=1e-9)
    settings = config(normalize=normalize, total_tokens=64, optimizer=still, wake=0.0)
    fit(sae, ArraySource(*arrays, batch_size=64), settings)
    after = evaluate(sae, [parts if len(parts) > 1 else parts[0]])
    assert after["fvu"] == pytest.approx(before["fvu"], rel=1e-3)
    assert after["l0"] == pytest.approx(before["l0"], abs=0.02)


def test_whitening_refuses_what_it_cannot_do() -> None:
    constant, tied = np.ones((640, D), np.float32), SAE(D, 32, k=4, tied=True)
    with pytest.raises(ValueError, match="activations must vary to be whitened"):
        fit(new_sae(), ArraySource(constant, batch_size=64), config(normalize="whiten"))
    with pytest.raises(ValueError, match="normalize must not be whiten where the loss is end to end"):
        fit(new_sae(), source(), config(normalize="whiten", loss=LossConfig(end_to_end="kl")))
    with pytest.raises(ValueError, match="normalize must not be whiten where the decoder is tied"):
        fit(tied, source(), config(normalize="whiten"))
    frozen = new_sae()
    frozen.decoder.freeze(keys=["weight"])
    with pytest.raises(ValueError, match=r"what it is folded into is frozen: \['decoder.weight'\]"):
        fit(frozen, source(), config(normalize="mean_std"))
    with pytest.raises(ValueError, match="whitening must lie from 0 to 1"):
        config(whitening=1.5)


def test_layer_norm_is_the_saes_own(tmp_path: Path) -> None:
    """Each token is normalised, in training and in use; files, weights on the way and the reconstruction's scale agree."""
    data = dictionary_data()
    rows = (data * np.random.default_rng(0).uniform(0.1, 10, (len(data), 1)) + 3).astype(np.float32)
    x = mx.array(rows[:500])
    centred = rows - rows.mean(axis=1, keepdims=True)
    by_hand = centred / (rows.std(axis=1, keepdims=True, ddof=1) + 1e-5)
    settings = config(total_tokens=300 * 64, normalize="layer_norm")
    sae = new_sae()
    result = fit(sae, ArraySource(rows, batch_size=64), settings, validation=rows[:640])
    # The same run on tokens normalised by hand ends in the same weights.
    plain = new_sae()
    fit(plain, ArraySource(by_hand, batch_size=64), config(total_tokens=300 * 64, normalize="none"))
    for name, w in weights(plain).items():
        np.testing.assert_allclose(weights(sae)[name], w, rtol=1e-3, atol=1e-3, err_msg=name)
    assert (sae.normalize_activations, plain.normalize_activations) == ("layer_norm", "none")
    code, other = sae.encode(x), SAE.from_weights(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, k=4)
    inner = other(mx.array(by_hand[:500]))
    expected = np.array(inner) * rows[:500].std(axis=1, keepdims=True, ddof=1) + rows[:500].mean(
        axis=1, keepdims=True
    )
    np.testing.assert_allclose(np.array(sae.decode(code, x)), expected, rtol=1e-4, atol=1e-3)
    assert evaluate(sae, [x])["fvu"] < 0.2
    fvu = (
        np.square(by_hand[:640] - np.array(other(mx.array(by_hand[:640])))).sum()
        / np.square(by_hand[:640] - by_hand[:640].mean(axis=0)).sum()
    )
    assert result.validations[-1]["val_fvu"] == pytest.approx(
        fvu, rel=0.05
    )  # of normalised tokens, by batches
    io.save(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_activations"] == "layer_norm"
    np.testing.assert_array_equal(np.array(io.load(tmp_path)(x)), np.array(sae(x)))
    # Steering adds in the token's own measure.
    moved = steer(sae, {3: 2.0}, mode="add")(x) - x
    np.testing.assert_allclose(
        np.array(moved),
        2 * rows[:500].std(axis=1, keepdims=True, ddof=1) * np.array(sae.W_dec[3]),
        rtol=1e-3,
        atol=1e-3,
    )
    with pytest.raises(ValueError, match="x must be given to decode, for its mean and deviation"):
        sae.decode(code)
    with pytest.raises(ValueError, match="normalize must be layer_norm for an SAE that normalises"):
        fit(sae, ArraySource(rows, batch_size=64), config())
    pair = ArraySource(rows, rows[:, :9], batch_size=64)
    with pytest.raises(
        ValueError, match="normalize must not be layer_norm where the target is not the input"
    ):
        fit(new_sae(d_out=9), pair, settings)
    with pytest.raises(
        ValueError, match="normalize_activations must be none where the target is not the one"
    ):
        Crosscoder(8, 2, 48, k=4).normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="normalize_activations must be none or layer_norm"):
        sae.normalize_activations = "batch"


# ---- every rule and shape resumes --------------------------------------------------------------------------


_SHAPES: dict[str, tuple[SAEConfig, int]] = {
    **{name: (SAEConfig(architecture=name), 1) for name in RULES},
    "whitened": (SAEConfig(train=TrainConfig(normalize="whiten")), 1),
    "transcoder with skip": (TranscoderConfig(skip=True), 2),
    "transcoder, whitened": (TranscoderConfig(train=TrainConfig(normalize="whiten")), 2),
    "transcoder, batchtopk": (TranscoderConfig(architecture="batchtopk"), 2),
    "crosscoder": (CrosscoderConfig(), 1),
    "crosscoder, relu": (CrosscoderConfig(architecture="relu"), 1),
    "crosscoder, ranked": (CrosscoderConfig(architecture="batchtopk", rank_by_decoder_norm=True), 1),
    "cross-layer": (CrossLayerConfig(), 2),
    "cross-layer, jumprelu": (CrossLayerConfig(architecture="jumprelu"), 2),
}


@pytest.mark.parametrize("name", _SHAPES)
def test_every_rule_and_shape_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Parameters, moments, thresholds and counters after a stop in the middle."""
    shape, n_arrays = _SHAPES[name]
    plain = type(shape) in (SAEConfig, TranscoderConfig)
    x = dictionary_data(1000)
    x = x if plain else np.concatenate([x, 2 * x + 1], axis=1)
    more: dict[str, Any] = {"k": 4, "d_sae": 64, "batch_size": 64, "total_tokens": 64 * 24}

    def run(**options: Any) -> Any:
        made = overruled(shape, more)
        sae = made.build(x.shape[1]) if plain else made.build(x.shape[1] // 2, 2)
        data = ArraySource(*[x, x[:, ::-1]][:n_arrays], batch_size=64, seed=1)
        return fit(sae, data, made.train, **options)

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_dir=tmp_path, callbacks=[StopAt(11)])
    resumed = run(checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(weights(resumed.sae), weights(whole.sae))
    for (where, a), (_, b) in zip(
        tree_flatten(whole.state.arrays), tree_flatten(resumed.state.arrays), strict=True
    ):
        assert mx.array_equal(a, b).item(), where


# ---- many at once ------------------------------------------------------------------------------------------


def sweep() -> list[Job]:
    base = config()
    faster = replace(base, optimizer=OptimizerConfig(learning_rate=1e-2))
    return [
        Job(SAE(D, D_SAE, k=2, seed=0), base, name="k2"),
        Job(SAE(D, 96, k=4, seed=1), replace(base, seed=1), name="wide"),
        Job(new_sae(), replace(faster, total_tokens=40 * 64), name="fast and short"),
        Job(
            new_sae(), replace(base, optimizer=OptimizerConfig(name="lion", learning_rate=1e-3)), name="lion"
        ),
    ]


def test_many_saes_get_the_bits_that_they_get_alone(tmp_path: Path) -> None:
    together = fit_many(sweep(), source())
    for job, result in zip(sweep(), together, strict=True):
        alone = fit(job.sae, source(), job.config)
        assert_same_bits(weights(result.sae), weights(alone.sae))
        assert [r["loss"] for r in result.history] == [r["loss"] for r in alone.history]
    assert [r.state.step for r in together] == [60, 60, 40, 60]
    # Interrupted and resumed, before and after one of them is done.
    for stop in (23, 47):
        jobs = [replace(job, callbacks=[StopAt(stop)] if job.name == "k2" else ()) for job in sweep()]
        with pytest.raises(KeyboardInterrupt):
            fit_many(jobs, source(), checkpoint_dir=tmp_path / str(stop))
        resumed = fit_many(sweep(), source(), checkpoint_dir=tmp_path / str(stop), resume=True)
        for a, b in zip(together, resumed, strict=True):
            assert_same_bits(weights(a.sae), weights(b.sae))
    with pytest.raises(ValueError, match="there must be 4 jobs as in the checkpoint but got 2"):
        fit_many(sweep()[:2], source(), checkpoint_dir=tmp_path / "47", resume=True)


def test_several_layers_from_one_batch() -> None:
    """Fields of a batch may serve as input of one and target of another."""
    x = dictionary_data()
    y = (x @ np.random.default_rng(1).normal(size=(D, 9))).astype(np.float32)
    jobs = [
        Job(new_sae(), config(), (0,)),
        Job(SAE(9, 32, k=4, seed=0), config(), (1,)),
        Job(new_sae(d_out=9), config(), (0, 1)),
        Job(new_sae(), config(normalize="mean_std"), (0,)),
        Job(new_sae(), config(normalize="whiten"), (0,)),
        Job(new_sae(), config(normalize="whiten", whitening=1.0), (0,)),
    ]
    results = fit_many(jobs, ArraySource(x, y, batch_size=64))
    alone = [
        fit(new_sae(), ArraySource(x, batch_size=64), config()),
        fit(SAE(9, 32, k=4, seed=0), ArraySource(y, batch_size=64), config()),
        fit(new_sae(d_out=9), ArraySource(x, y, batch_size=64), config()),
        fit(new_sae(), ArraySource(x, batch_size=64), config(normalize="mean_std")),
        fit(new_sae(), ArraySource(x, batch_size=64), config(normalize="whiten")),
        fit(new_sae(), ArraySource(x, batch_size=64), config(normalize="whiten", whitening=1.0)),
    ]
    for a, b in zip(results, alone, strict=True):
        assert_same_bits(weights(a.sae), weights(b.sae))


def test_what_is_shared_is_read_and_scaled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxsae.train import loop

    read, medians = [], []
    data = source()
    next_batch, median = data.next_batch, loop.geometric_median
    monkeypatch.setattr(data, "next_batch", lambda: read.append(1) or next_batch())
    monkeypatch.setattr(loop, "geometric_median", lambda x: medians.append(1) or median(x))
    seen: set[int] = set()

    class Engine:
        def __init__(self, inner: Any):
            self.inner, self.name = inner, inner.name

        def optimizer_state(self, params: Any) -> Any:
            return self.inner.optimizer_state(params)

        def step(self, arrays: Any, x: mx.array, y: mx.array, **rest: Any) -> Any:
            seen.add(id(x))
            assert y is x
            return self.inner.step(arrays, x, y, **rest)

    make = loop.make_engine
    monkeypatch.setattr(loop, "make_engine", lambda *a: Engine(make(*a)))
    fit_many([Job(SAE(D, D_SAE, k=k, seed=0), config(total_tokens=64)) for k in (1, 2, 4)], data)
    assert (len(read), len(medians), len(seen)) == (1, 1, 1)


def test_jobs_that_cannot_share_are_named() -> None:
    two = [Job(new_sae(), config()), Job(new_sae(), config(batch_size=32))]
    with pytest.raises(
        ValueError, match=r"\[fit_many\] batch_size must be the same in all jobs but got 64 and 32"
    ):
        fit_many(two, source())
    with pytest.raises(ValueError, match=r"names must differ but got \['a', 'a'\]"):
        fit_many([Job(new_sae(), config(), name="a")] * 2, source())
    with pytest.raises(ValueError, match="there must be at least one job"):
        fit_many([], source())
    with pytest.raises(ValueError, match=r"fields must be one or two numbers below 1 but got \(0, 1\)"):
        fit_many([Job(new_sae(), config(), (0, 1))], source())


# ---- randomness --------------------------------------------------------------------------------------------


def test_steps_draw_their_own_numbers_and_leave_the_callers() -> None:
    mx.random.seed(9)
    mx.random.normal((3,))
    before = np.array(mx.random.state[0])
    fit(new_sae(), source(), config(total_tokens=640), preprocess=noisy)
    np.testing.assert_array_equal(np.array(mx.random.state[0]), before)
    draws = set()
    with kept_random_state():
        for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1), (-1, 0, 0)]:
            seed_step(*key)
            draws.add(float(mx.random.uniform()))
    assert len(draws) == 6
