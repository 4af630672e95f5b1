"""The trainer's parts: losses, AuxK, configuration, schedules, initialisation, constraints, sources."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxsae import loss as L
from mlxsae.data import ArraySource, Chunk, IterableSource, ShuffleBuffer, as_source
from mlxsae.loss.reconstruction import UNIFORM, sum_about_mean
from mlxsae.sae import SAE
from mlxsae.train import (
    LossConfig,
    OptimizerConfig,
    SAEConfig,
    TrainConfig,
    fit,
    geometric_median,
    warmup_decay,
)
from mlxsae.train.constraints import unit_rows, without_parallel
from mlxsae.train.initial import expected_norm_scale, finite_rows
from mlxsae.train.state import scaled_params

# ---- reconstruction ----------------------------------------------------------------------------------------


def test_reconstruction_terms_match_their_definitions() -> None:
    rng = np.random.default_rng(0)
    y, y_hat = rng.normal(size=(2, 9, 5))
    e2 = (y - y_hat) ** 2
    a, b = mx.array(e2.sum(1).astype(np.float32)), mx.array(y.astype(np.float32))
    assert L.mse(a, b).item() == pytest.approx(e2.sum(1).mean(), rel=1e-5)
    assert L.fvu(a, b).item() == pytest.approx(e2.sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-5)
    assert L.nmse(a, b).item() == pytest.approx((e2.sum(1) / (y**2).sum(1)).mean(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(L.RECONSTRUCTION))
def test_degenerate_batches_are_finite_and_nan_stays(name: str) -> None:
    term = L.RECONSTRUCTION[name]
    value, gradient = mx.value_and_grad(lambda s: term(s, mx.zeros((3, 4))))(mx.zeros(3))
    assert value.item() == 0
    assert mx.isfinite(gradient).all().item()
    assert math.isnan(term(mx.full((3,), float("nan")), mx.ones((3, 4))).item())


@pytest.mark.parametrize("name", sorted(L.RECONSTRUCTION))
def test_uniform_terms_weigh_tokens_alike(name: str) -> None:
    term = L.RECONSTRUCTION[name]
    y = mx.random.normal((9, 4), key=mx.random.key(0)) * mx.arange(1, 10)[:, None]
    gradient = np.array(mx.grad(lambda s: term(s, y))(mx.arange(1.0, 10.0)))
    assert (np.ptp(gradient) == 0) == (term in UNIFORM) == L.Loss({name: (2.0, term)}).uniform
    assert not L.Loss({name: (2.0, term), "own": (1.0, lambda s, y: s.max())}).uniform


def test_sums_about_the_mean_survive_a_large_mean() -> None:
    y = np.random.default_rng(0).normal(size=(300, 70)) + 500
    got = sum_about_mean(mx.array(y.astype(np.float32))).item()
    assert got == pytest.approx(((y - y.mean(0)) ** 2).sum(), rel=1e-4)
    assert math.isnan(sum_about_mean(mx.array([[1.0, math.nan], [1.0, 2.0]])).item())


def test_loss_is_the_weighted_sum_of_named_terms() -> None:
    sae, x = SAE(6, 20, k=3, seed=0), mx.random.normal((7, 6), key=mx.random.key(0))
    code = sae.encode(x)
    forward = L.Forward(sae, x, x, code, sae.decode(code))
    loss = L.Loss(
        {"mse": (2.0, L.mse), "fvu": (0.5, L.fvu)},
        terms={"l1": (0.1, lambda f: f.code.values.sum(axis=-1).mean())},
    )
    total, values = loss(forward)
    assert set(values) == {"mse", "fvu", "l1"}
    expected = 2 * values["mse"].item() + 0.5 * values["fvu"].item() + 0.1 * values["l1"].item()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert values["l1"].item() == pytest.approx(code.values.sum(axis=-1).mean().item())


# ---- AuxK --------------------------------------------------------------------------------------------------


def forward_of(sae: SAE, x: mx.array, y: mx.array, dead: mx.array) -> L.Forward:
    code = sae.encode(x)
    return L.Forward(sae, x, y, code, sae.decode(code), dead)


def auxk64(sae: SAE, x: mx.array, y: mx.array, dead: np.ndarray, k_aux: int, preset: str) -> float:
    """AuxK in float64, written from the table in the docs of mlxsae.loss.auxk."""
    w_e, w_d, b_e, b_d, x64, y64 = (
        np.array(a, np.float64) for a in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, x, y)
    )
    pre = (x64 - b_d if sae.apply_b_dec_to_input else x64) @ w_e + b_e
    top = np.argsort(-pre, axis=1, kind="stable")[:, : sae.rule.k]
    acts = np.zeros_like(pre)
    np.put_along_axis(acts, top, np.maximum(np.take_along_axis(pre, top, 1), 0), 1)
    e = y64 - acts @ w_d - b_d
    if preset == "weakest":
        e = e + np.where(acts < acts[acts > 0].mean(), acts, 0) @ w_d
    n_dead = dead.sum()
    if n_dead == 0:
        return 0.0
    k = min(k_aux, n_dead)
    candidates = np.where(dead, pre, -np.inf)
    top = np.argsort(-candidates, axis=1, kind="stable")[:, :k]
    aux = np.zeros_like(pre)
    chosen = np.take_along_axis(candidates, top, 1)
    np.put_along_axis(aux, top, chosen if preset == "saelens" else np.maximum(chosen, 0), 1)
    error = ((aux @ w_d - e) ** 2).sum()
    if preset == "saelens":
        return error / len(e) * min(n_dead / k_aux, 1)
    if preset == "sparsify":
        return error / ((y64 - y64.mean(0)) ** 2).sum() * min(n_dead / k_aux, 1)
    return error / ((e - e.mean(0)) ** 2).sum()


@pytest.fixture
def aux_case() -> tuple[SAE, mx.array]:
    sae = SAE(6, 30, k=3, seed=0)
    rng = np.random.default_rng(0)
    sae.b_enc = mx.array(rng.normal(size=30).astype(np.float32)) * 0.3
    sae.b_dec = mx.array(rng.normal(size=6).astype(np.float32))
    return sae, mx.array(rng.normal(size=(11, 6)).astype(np.float32))


@pytest.mark.parametrize("n_dead", [0, 1, 4, 5, 12, 30])
@pytest.mark.parametrize("preset", sorted(L.AUXK_PRESETS))
def test_auxk_value(aux_case: tuple, preset: str, n_dead: int) -> None:
    """Also where fewer latents are dead than k_aux, and where none or all are."""
    sae, x = aux_case
    dead = np.zeros(30, bool)
    dead[np.random.default_rng(n_dead).permutation(30)[:n_dead]] = True
    got = L.AuxK(5, preset)(forward_of(sae, x, x, mx.array(dead))).item()
    assert got == pytest.approx(auxk64(sae, x, x, dead, 5, preset), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("preset", sorted(L.AUXK_PRESETS))
def test_auxk_gradient_against_finite_differences(aux_case: tuple, preset: str) -> None:
    """Encoder and decoder both learn; the target of the differences is that of the unmoved weights (detached)."""
    sae, x = aux_case
    dead = np.zeros(30, bool)
    dead[[2, 7, 11, 19, 23, 28]] = True
    term = L.AuxK(4, preset)
    own = sae.parameters()

    def value(params: dict) -> mx.array:
        sae.update(params)
        return term(forward_of(sae, x, x, mx.array(dead)))

    gradient = dict(tree_flatten(mx.grad(value)(own)))
    sae.update(own)
    target = np.array(x - sae(x), np.float64)
    if preset == "weakest":
        acts = np.array(sae.to_dense(sae.encode(x)), np.float64)
        target = target + np.where(acts < acts[acts > 0].mean(), acts, 0) @ np.array(sae.W_dec, np.float64)
    flat = {name: np.array(a, np.float64) for name, a in tree_flatten(own)}

    def detached64(values: dict[str, np.ndarray]) -> float:
        pre = (np.array(x, np.float64) - values["decoder.bias"]) @ values["encoder.weight"].T + values[
            "encoder.bias"
        ]
        candidates = np.where(dead, pre, -np.inf)
        top = np.argsort(-candidates, axis=1, kind="stable")[:, :4]
        acts = np.take_along_axis(candidates, top, 1)
        acts = acts if preset == "saelens" else np.maximum(acts, 0)
        aux_hat = (acts[..., None] * values["decoder.weight"][top]).sum(1)
        if preset == "openai":
            aux_hat = aux_hat + values["decoder.bias"] - flat["decoder.bias"]
        error = ((aux_hat - target) ** 2).sum()
        x64 = np.array(x, np.float64)
        if preset == "saelens":
            return error / len(target)
        base = x64 if preset == "sparsify" else target
        return error / ((base - base.mean(0)) ** 2).sum()

    for name, values in flat.items():
        for index in np.ndindex(values.shape):
            if "weight" in name and index[0] not in (2, 7, 11, 0):
                continue
            moved = {n: v.copy() for n, v in flat.items()}
            moved[name][index] += 1e-6
            up = detached64(moved)
            moved[name][index] -= 2e-6
            numeric = (up - detached64(moved)) / 2e-6
            assert np.array(gradient[name])[index] == pytest.approx(numeric, rel=1e-3, abs=2e-5), (
                name,
                index,
            )
    for name in ("encoder.weight", "encoder.bias", "decoder.weight"):
        per_latent = np.abs(np.array(gradient[name])).reshape(30, -1).sum(1)
        assert (per_latent[dead] > 0).sum() >= 5, name  # no encoder without gradient
        assert not per_latent[~dead].any(), name  # and nothing but dead latents moves


def test_auxk_of_a_transcoder_explains_the_target(aux_case: tuple) -> None:
    _, x = aux_case
    coder = SAE(6, 30, k=3, d_out=4, seed=1)
    y = mx.random.normal((11, 4), key=mx.random.key(4))
    dead = np.arange(30) % 3 == 0
    got = L.AuxK(5)(forward_of(coder, x, y, mx.array(dead))).item()
    assert got == pytest.approx(auxk64(coder, x, y, dead, 5, "dictionary_learning"), rel=1e-5)


def test_auxk_bad_arguments(aux_case: tuple) -> None:
    sae, x = aux_case
    with pytest.raises(ValueError, match=r"\[AuxK\] preset must be one of .* but got 'best'"):
        L.AuxK(4, "best")
    with pytest.raises(ValueError, match=r"\[AuxK\] k_aux must be positive but got 0"):
        L.AuxK(0)
    with pytest.raises(ValueError, match=r"\[AuxK\] the forward pass must say which latents are dead"):
        L.AuxK(4)(L.Forward(sae, x, x, sae.encode(x), sae(x)))


# ---- configuration -----------------------------------------------------------------------------------------


def test_config_round_trips_through_json() -> None:
    config = SAEConfig(
        d_in=8,
        k=4,
        dtype="bfloat16",
        train=TrainConfig(
            total_tokens=123,
            optimizer=OptimizerConfig(learning_rate=1, betas=(0.5, 0.6), max_grad_norm=None),
            loss=LossConfig(auxk=None, k_aux=7),
        ),
    )
    again = SAEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.train.optimizer.learning_rate, float)
    assert SAEConfig.from_dict(SAEConfig().to_dict()) == SAEConfig()
    assert SAEConfig.from_dict({"k": 5, "train": {"loss": {"k_aux": 9}}}, partial=True) == SAEConfig(
        k=5, train=TrainConfig(loss=LossConfig(k_aux=9))
    )


def edited(path: str, value: object = ...) -> dict:
    config = json.loads(json.dumps(SAEConfig().to_dict()))
    *parents, last = path.split(".")
    level = config
    for name in parents:
        level = level[name]
    if value is ...:
        del level[last]
    else:
        level[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (edited("train.optimizer.lr", 1.0), r"keys must be known but got train\.optimizer\.lr; known are"),
        (edited("kk", 1), r"keys must be known but got kk"),
        (edited("train.loss.k_aux"), r"every key must be given but train\.loss\.k_aux is missing"),
        (edited("k"), r"every key must be given but k is missing"),
        (edited("k", "32"), r"k must be int but got '32'"),
        (edited("k", True), r"k must be int but got True"),
        (edited("train.normalize_decoder", 1), r"train\.normalize_decoder must be bool but got 1"),
        (edited("train.optimizer.betas", [0.9]), r"train\.optimizer\.betas must be a list of 2"),
        (edited("train.optimizer", 3), r"train\.optimizer\.? must be an object but got 3"),
        (edited("train.optimizer.learning_rate", -1.0), r"learning_rate must be positive but got -1\.0"),
        (edited("train.optimizer.warmup", 0.95), r"warmup \+ decay must be at most 1"),
        (edited("train.wake", -0.1), r"wake must not be negative but got -0.1"),
        (edited("train.loss.auxk", "mine"), r"auxk must be None or one of"),
        (edited("train.batch_size", 0), r"batch_size must be positive but got 0"),
        (edited("train.engine", "gpu"), r"engine must be one of"),
        (
            edited("train.precision", "fp8"),
            r"precision must be one of \['float32', 'certified', 'tf32', 'bfloat16'\] but got 'fp8'",
        ),
        (edited("train.optimizer.moments", "float16"), r"moments must be one of \['float32', 'bfloat16'\]"),
        (edited("architecture", "moe"), r"architecture must be one of"),
        (edited("dtype", "float8"), r"dtype must be one of"),
    ],
)
def test_bad_config(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"\[config\] " + message):
        SAEConfig.from_dict(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAEConfig(k="8"), "k must be int but got '8'"),
        (lambda: SAEConfig(expansion_factor=2.5), r"expansion_factor must be int but got 2\.5"),
        (lambda: SAEConfig(rule=5), "rule must be an object but got 5"),
        (lambda: SAEConfig(train=OptimizerConfig()), "train must be an object but got OptimizerConfig"),
        (lambda: TrainConfig(batch_size=0.5), r"batch_size must be int but got 0\.5"),
        (lambda: TrainConfig(seed=-1), r"seed must be in \[0, 2\^64\) but got -1"),
        (lambda: TrainConfig(seed=2**64), r"seed must be in \[0, 2\^64\) but got"),
        (lambda: TrainConfig(mixed_precision="yes"), "mixed_precision must be bool but got 'yes'"),
        (lambda: OptimizerConfig(learning_rate=float("inf")), "learning_rate must be finite but got inf"),
        (lambda: SAEConfig(wandb_tags="abc"), "tags must be a list but got 'abc'"),
        (lambda: SAEConfig(dead_neuron_threshold=2), r"dead_neuron_threshold must be a share in \[0, 1\)"),
        (lambda: SAEConfig(component_weights=[1, 2]), "SAEConfig has no source_weights"),
    ],
)
def test_a_constructor_checks_what_it_is_given(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=r"\[config\] (keys must be known but )?" + message):
        make()


def test_a_constructor_takes_what_json_and_numpy_give() -> None:
    config = SAEConfig(k=np.int64(4), train={"optimizer": {"betas": [0.5, 0.6], "warmup": 0}}, batch_size=8)
    assert (config.k, config.train.batch_size) == (4, 8)
    assert SAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_builds_the_sae() -> None:
    built = SAEConfig(k=4, expansion_factor=3, train=TrainConfig(seed=5)).build(8)
    assert (built.d_in, built.d_sae, built.rule.k) == (8, 24, 4)
    assert mx.array_equal(built.W_dec, SAE(8, 24, k=4, seed=5).W_dec).item()
    assert SAEConfig(k=4, d_sae=50).build(8).d_sae == 50
    with pytest.raises(
        ValueError, match=r"\[SAEConfig\] d_in must be the activations' width 8 but got d_in=9"
    ):
        SAEConfig(d_in=9).build(8)


# ---- schedules, initialisation, constraints ----------------------------------------------------------------


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_warmup_decay(shape: str) -> None:
    factor = warmup_decay(100, warmup=0.1, decay=0.2, shape=shape)
    values = [factor(i) for i in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9:81] == [1.0] * 72
    assert all(a < b for a, b in itertools.pairwise(values[:10]))
    assert all(a > b > -1e-12 for a, b in itertools.pairwise(values[80:]))
    assert values[90] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0)
    assert [warmup_decay(5, warmup=0, decay=0)(i) for i in range(5)] == [1.0] * 5


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_decay_of_more_steps_than_there_are_follows_the_warm_up(shape: str) -> None:
    factor = warmup_decay(100, warmup=20, decay=50_000, shape=shape)
    same = warmup_decay(100, warmup=0.2, decay=0.8, shape=shape)
    assert [factor(i) for i in range(101)] == [same(i) for i in range(101)]
    assert max(factor(i) for i in range(100)) == pytest.approx(1.0, rel=1e-2)
    assert warmup_decay(10, warmup=1000, decay=0.5, shape=shape)(9) == pytest.approx(0.01)


def test_a_warm_up_longer_than_the_run_is_told() -> None:
    data = ArraySource(np.random.default_rng(0).normal(size=(64, 8)), batch_size=16)
    settings = TrainConfig(total_tokens=64, batch_size=16, optimizer=OptimizerConfig(warmup=1000))
    with pytest.warns(UserWarning, match="warmup should be shorter than the run but takes 1000 steps of 4"):
        fit(SAE(8, 16, k=2), data, settings)


def test_geometric_median_minimises_distances() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(500, 6)) + 2, 1000 * rng.normal(size=(20, 6))]).astype(np.float32)
    got = np.array(geometric_median(mx.array(x)), np.float64)
    cost = lambda p: np.linalg.norm(x - p, axis=1).sum()  # noqa: E731
    for _ in range(200):
        assert cost(got) <= cost(got + 0.01 * rng.normal(size=6))
    assert np.linalg.norm(got - 2) < 0.5 < np.linalg.norm(x.mean(0) - 2)  # outliers drag the mean
    line = mx.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [9.0, 0.0]])  # the median sits on a data point
    np.testing.assert_allclose(np.array(geometric_median(line)), 0, atol=1e-3)
    np.testing.assert_allclose(np.array(geometric_median(mx.ones((4, 3)))), 1)
    with pytest.raises(ValueError, match=r"\[geometric_median\] x must have shape"):
        geometric_median(mx.zeros((0, 3)))


def test_finite_rows_and_scale() -> None:
    x = mx.array([[1.0, 2.0], [float("nan"), 0.0], [3.0, 4.0], [float("inf"), 1.0]])
    (kept,) = finite_rows(x)
    assert kept.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match="every row of the first sample holds NaN or inf"):
        finite_rows(x[1:2])
    scaled = expected_norm_scale(kept) * kept
    assert mx.linalg.norm(scaled, axis=-1).mean().item() == pytest.approx(math.sqrt(2), rel=1e-6)
    with pytest.raises(ValueError, match="positive mean norm"):
        expected_norm_scale(mx.zeros((3, 2)))


def test_unit_rows_and_projection() -> None:
    rng = np.random.default_rng(0)
    w = unit_rows(mx.array(rng.normal(size=(9, 5)).astype(np.float32)))
    np.testing.assert_allclose(np.linalg.norm(np.array(w), axis=1), 1, atol=1e-6)
    g = without_parallel(mx.array(rng.normal(size=(9, 5)).astype(np.float32)), w)
    np.testing.assert_allclose((np.array(g) * np.array(w)).sum(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.array(without_parallel(g, w)), np.array(g), atol=1e-6)
    assert not np.array(unit_rows(mx.zeros((2, 3)))).any()


@pytest.mark.parametrize("d_out", [None, 4])
def test_scaling_folds_into_weights(d_out: int | None) -> None:
    """The SAE with folded weights on raw activations is the scaled one on scaled ones, exactly undone."""
    sae = SAE(6, 20, k=3, d_out=d_out, seed=0)
    sae.b_enc, sae.b_dec = mx.random.normal((20,)), mx.random.normal((sae.d_out,))
    s_in, s_out = 8.0, (8.0 if d_out is None else 0.5)
    x = mx.random.normal((9, 6))
    expected = sae(s_in * x) / s_out
    values = sae.encode(s_in * x).values / s_in
    own = sae.parameters()
    raw = scaled_params(sae, own, 1 / s_in, 1 / s_out)
    sae.update(raw)
    np.testing.assert_allclose(np.array(sae(x)), np.array(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(sae.encode(x).values), np.array(values), rtol=1e-5, atol=1e-6)
    if d_out is None:  # decoder rows keep their norm
        np.testing.assert_array_equal(np.array(sae.W_dec), np.array(own["decoder"]["weight"]))
    back = dict(tree_flatten(scaled_params(sae, raw, s_in, s_out)))
    for name, a in tree_flatten(own):
        np.testing.assert_array_equal(np.array(back[name]), np.array(a))


# ---- sources -----------------------------------------------------------------------------------------------


def numbered(n: int, d: int = 3, start: int = 0) -> np.ndarray:
    """Rows that know their number."""
    return np.arange(start, start + n, dtype=np.float32)[:, None] + np.arange(d, dtype=np.float32) / 10


def drain(source: object) -> list[list[int]]:
    batches = []
    while (batch := source.next_batch()) is not None:
        assert batch[0].dtype == mx.float32
        batches.append(np.array(batch[0])[:, 0].astype(int).tolist())
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def chunked(n: int, size: int) -> Iterator[np.ndarray]:
    for i in range(0, n, size):
        yield numbered(min(size, n - i), start=i)


def make(kind: str, seed: int = 0) -> object:
    if kind == "array":
        return ArraySource(numbered(101), batch_size=8, seed=seed, epochs=3)
    if kind == "shuffle":
        return ShuffleBuffer(chunked(101, 10), batch_size=8, capacity=40, seed=seed)
    return IterableSource(mx.array(c) for c in chunked(101, 10))


def test_array_source_shows_every_row_once_an_epoch() -> None:
    rows = flat(drain(make("array")))
    assert len(rows) == 303
    for epoch in range(3):
        assert sorted(rows[epoch * 101 : (epoch + 1) * 101]) == list(range(101))
    assert rows[:101] != rows[101:202] != list(range(101))
    assert drain(make("array", seed=1)) != drain(make("array"))
    assert drain(make("array")) == drain(make("array"))


def test_shuffle_buffer_gives_every_valid_row_once() -> None:
    batches = drain(make("shuffle"))
    rows = flat(batches)
    assert sorted(rows) == list(range(101))
    assert [len(b) for b in batches] == [8] * 12 + [5]
    assert rows != sorted(rows)
    assert drain(make("shuffle")) == batches
    assert drain(make("shuffle", seed=1)) != batches


def test_shuffle_buffer_mixes_and_stays_within_its_memory() -> None:
    read = [0]

    def counting() -> Iterator[np.ndarray]:
        for chunk in chunked(10_000, 50):
            read[0] += len(chunk)
            yield chunk

    source = ShuffleBuffer(counting(), batch_size=64, capacity=1000, seed=0)
    given, ages = 0, []
    while (batch := source.next_batch()) is not None:
        given += len(batch[0])
        assert read[0] - given <= 1000 + 50
        rows = np.array(batch[0])[:, 0]
        ages.append(np.ptp(rows))
    assert given == 10_000
    assert np.median(ages) > 900  # a batch reaches across the buffer


def test_valid_mask_and_leading_dimensions() -> None:
    x = numbered(24).reshape(2, 12, 3)
    valid = np.ones((2, 12), bool)
    valid[0, 0] = valid[1, 5:] = False
    chunks = [Chunk(mx.array(x), valid=mx.array(valid)), Chunk(numbered(4, start=100)), numbered(0)]
    rows = flat(drain(ShuffleBuffer(chunks, batch_size=4, capacity=16)))
    assert sorted(rows) == [*range(1, 12), *range(12, 17), *range(100, 104)]


def test_pairs_stay_together() -> None:
    x = numbered(50)
    y = np.concatenate([x * 2, x[:, :1]], axis=1)
    for source in (
        ShuffleBuffer([Chunk(x[:20], y[:20]), Chunk(x[20:], y[20:])], batch_size=7, capacity=30),
        ArraySource(x, y, batch_size=7, epochs=1),
    ):
        sample = source.sample(5)
        np.testing.assert_allclose(np.array(sample[1])[:, :3], 2 * np.array(sample[0]))
        seen = 0
        while (batch := source.next_batch()) is not None:
            np.testing.assert_allclose(np.array(batch[1])[:, :3], 2 * np.array(batch[0]))
            seen += len(batch[0])
        assert seen == 50


def test_low_precision_activations_arrive_as_float32() -> None:
    x = mx.array(numbered(20)).astype(mx.bfloat16)
    assert sorted(flat(drain(ShuffleBuffer([x], batch_size=4, capacity=8)))) == list(range(20))
    assert ArraySource(x, batch_size=4).next_batch()[0].dtype == mx.float32


@pytest.mark.parametrize("kind", ["array", "shuffle", "iterable"])
@pytest.mark.parametrize("taken", [0, 1, 5, 9])
def test_restored_source_continues_with_the_same_batches(kind: str, taken: int) -> None:
    source = make(kind)
    for _ in range(taken):
        source.next_batch()
    position, arrays = source.state()
    position = json.loads(json.dumps(position))
    rest = drain(source)
    other = make(kind)
    other.restore(position, arrays)
    assert drain(other) == rest


class Interrupted:
    """Chunks each of which, from the fifth on, is reached only at the second attempt."""

    def __init__(self, knows_its_position: bool) -> None:
        self.next, self._struck = 0, set[int]()
        if knows_its_position:
            self.state = lambda: self.next
            self.restore = lambda position: setattr(self, "next", position)

    def __iter__(self) -> Iterator[np.ndarray]:
        first = self.next if hasattr(self, "state") else 0
        for i in range(first, 20):
            if i >= 4 and i not in self._struck:
                self._struck.add(i)
                raise KeyboardInterrupt
            self.next = i + 1
            yield numbered(10, start=10 * i)


@pytest.mark.parametrize("kind", ["position", "again", "once"])
def test_an_interrupt_while_the_buffer_fills_loses_nothing(kind: str) -> None:
    chunks = Interrupted(kind == "position")
    source = ShuffleBuffer(chunks if kind != "once" else Once(), batch_size=8, capacity=40)
    batches, struck, states = [], 0, []
    while True:
        try:
            batch = source.next_batch()
        except KeyboardInterrupt:
            struck += 1
            states.append((len(batches), *source.state()))
            continue
        if batch is None:
            break
        batches.append(np.array(batch[0])[:, 0].astype(int).tolist())
    assert struck == 16
    assert sorted(itertools.chain(*batches)) == list(range(200))
    if kind == "once":  # what cannot be read again is mixed in at once
        return
    plain = ShuffleBuffer([numbered(10, start=10 * i) for i in range(20)], batch_size=8, capacity=40)
    assert batches == [[int(row) for row in batch] for batch in drain(plain)]
    for taken, position, arrays in states:  # and so does a run that is resumed from there
        other = Interrupted(kind == "position")
        other._struck = set(range(20))
        resumed = ShuffleBuffer(other, batch_size=8, capacity=40)
        resumed.restore(json.loads(json.dumps(position)), arrays)
        assert [[int(row) for row in batch] for batch in drain(resumed)] == batches[taken:]


class Once:
    """The same, as an iterator that goes on after it has raised."""

    def __init__(self) -> None:
        self._next, self._struck = 0, set[int]()

    def __iter__(self) -> Once:
        return self

    def __next__(self) -> np.ndarray:
        i = self._next
        if i == 20:
            raise StopIteration
        if i >= 4 and i not in self._struck:
            self._struck.add(i)
            raise KeyboardInterrupt
        self._next += 1
        return numbered(10, start=10 * i)


def test_chunks_that_know_their_position_are_not_replayed() -> None:
    class Chunks:
        def __init__(self) -> None:
            self.next, self.read = 0, 0

        def __iter__(self) -> Iterator[np.ndarray]:
            while self.next < 20:
                self.next += 1
                self.read += 1
                yield numbered(10, start=10 * (self.next - 1))

        def state(self) -> int:
            return self.next

        def restore(self, position: int) -> None:
            self.next = position

    first = ShuffleBuffer(Chunks(), batch_size=8, capacity=40)
    for _ in range(10):
        first.next_batch()
    position, arrays = first.state()
    rest = drain(first)
    chunks = Chunks()
    second = ShuffleBuffer(chunks, batch_size=8, capacity=40)
    second.restore(json.loads(json.dumps(position)), arrays)
    assert drain(second) == rest
    assert chunks.read == 20 - position["chunks"]


@pytest.mark.parametrize("kind", ["array", "shuffle", "iterable"])
def test_sampling_disturbs_nothing(kind: str) -> None:
    sampled = make(kind)
    rows = sampled.sample(30)[0]
    assert rows.shape == (30, 3)
    assert drain(sampled) == drain(make(kind))


def test_positions_of_another_source_are_refused() -> None:
    position, arrays = make("array").state()
    with pytest.raises(ValueError, match=r"\[ArraySource\] to resume, seed must be 0 but got 1"):
        make("array", seed=1).restore(position, arrays)
    with pytest.raises(ValueError, match=r"kind must be 'array' but got 'shuffle'"):
        make("shuffle").restore(position, arrays)
    with pytest.raises(ValueError, match=r"the iterable must give 9 batches but ended before"):
        IterableSource([mx.zeros((2, 3))]).restore({"kind": "iterable", "taken": 9}, {})
    source = IterableSource([mx.zeros((2, 3))] * 4)
    before, _ = source.state()
    source.next_batch()
    with pytest.raises(ValueError, match="at most 0 batches may have been taken but 1 were"):
        source.restore(before, {})


def test_as_source() -> None:
    source = make("array")
    assert as_source(source) is source
    assert isinstance(as_source([mx.zeros((2, 3))]), IterableSource)


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (
            lambda: ArraySource(np.zeros((4, 3, 2)), batch_size=2),
            r"\[ArraySource\] x must have shape \[n, d\]",
        ),
        (
            lambda: ArraySource(np.zeros((4, 3)), np.zeros((5, 3)), batch_size=2),
            r"\[ArraySource\] y must have shape",
        ),
        (lambda: ArraySource(np.zeros((0, 3)), batch_size=2), r"there must be at least one row"),
        (lambda: ArraySource(np.zeros((4, 3)), batch_size=0), r"\[ArraySource\] batch_size must be positive"),
        (
            lambda: ShuffleBuffer([], batch_size=9, capacity=8),
            r"capacity must be at least batch_size=9 but got 8",
        ),
        (lambda: ShuffleBuffer([], batch_size=2, refill=1.0), r"refill must be in \[0, 1\)"),
        (
            lambda: ShuffleBuffer([], batch_size=2).sample(3),
            r"at least one valid token but the stream has none",
        ),
        (
            lambda: ShuffleBuffer([Chunk(np.zeros((2, 3)), valid=np.ones(3, bool))], batch_size=2).sample(1),
            r"valid must be bool of shape \(2,\) but got bool \(3,\)",
        ),
        (lambda: ShuffleBuffer([np.zeros(3)], batch_size=2).sample(1), r"activations must be \[\.\.\., d\]"),
        (lambda: IterableSource([]).sample(3), r"there must be at least one batch but got none"),
    ],
)
def test_bad_sources(make_bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_bad()
