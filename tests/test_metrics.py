"""Metrics against NumPy float64, and streams against the whole."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxsae import metrics
from mlxsae.code import DenseCode, SparseCode, SparseCodeCSR
from mlxsae.loss.reconstruction import sum_about_mean
from mlxsae.sae import SAE, Crosscoder, CrossLayerTranscoder
from mlxsae.train.initial import column_statistics

N, D, D_SAE, K = 300, 24, 50, 6


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, SparseCode]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)) * rng.uniform(0.1, 3, D) + rng.normal(size=D)
    x_hat = x + 0.3 * rng.normal(size=(N, D))
    indices = np.sort(np.stack([rng.choice(D_SAE - 3, K, replace=False) for _ in range(N)]), axis=1)
    values = np.maximum(rng.normal(size=(N, K)), 0)  # some slots are unused
    return (
        x.astype(np.float32),
        x_hat.astype(np.float32),
        SparseCode(mx.array(values.astype(np.float32)), mx.array(indices.astype(np.uint32))),
    )


def fvu64(x: np.ndarray, x_hat: np.ndarray) -> float:
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    return ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


def dense64(code: SparseCode) -> np.ndarray:
    out = np.zeros((code.values.shape[0], D_SAE))
    np.put_along_axis(out, np.array(code.indices).astype(int), np.array(code.values, np.float64), -1)
    return out


def test_functions_match_their_definitions(data: tuple) -> None:
    x, x_hat, code = data
    mx_x, mx_hat, latents = mx.array(x), mx.array(x_hat), dense64(code)
    assert metrics.fvu(mx_x, mx_hat).item() == pytest.approx(fvu64(x, x_hat), rel=1e-5)
    assert metrics.explained_variance(mx_x, mx_hat).item() == pytest.approx(1 - fvu64(x, x_hat), rel=1e-5)
    ratio = ((x - x_hat) ** 2).sum(1) / (x**2).sum(1)
    assert metrics.nmse(mx_x, mx_hat).item() == pytest.approx(ratio.mean(), rel=1e-5)
    assert metrics.l0(code).item() == pytest.approx((latents > 0).sum(1).mean(), rel=1e-6)
    counts = metrics.fire_counts(code, D_SAE)
    np.testing.assert_array_equal(np.array(counts), (latents > 0).sum(0))
    np.testing.assert_allclose(np.array(metrics.fire_rate(counts, N)), (latents > 0).mean(0), rtol=1e-6)
    dead = (latents > 0).sum(0) == 0
    assert dead.sum() >= 3
    assert metrics.dead_fraction(counts).item() == pytest.approx(dead.mean())


def test_a_large_batch_keeps_its_digits() -> None:
    """One float32 sum over 13 million numbers was off by 0.3 %."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 64)).astype(np.float32)
    x_hat = x + np.float32(0.1) * rng.normal(size=x.shape).astype(np.float32)
    got = metrics.fvu(mx.array(x), mx.array(x_hat)).item()
    assert got == pytest.approx(fvu64(x, x_hat), rel=1e-5)


def test_leading_dimensions_are_tokens(data: tuple) -> None:
    x, x_hat, code = data
    deep = SparseCode(*(a.reshape(3, N // 3, K) for a in code))
    assert metrics.l0(deep).item() == metrics.l0(code).item()
    a, b = (mx.array(v).reshape(3, N // 3, D) for v in (x, x_hat))
    assert metrics.fvu(a, b).item() == pytest.approx(fvu64(x, x_hat), rel=1e-5)


def test_ragged_codes_count_alike(data: tuple) -> None:
    _, _, code = data
    latents = dense64(code)
    rows, columns = np.nonzero(latents)
    ragged = SparseCodeCSR(
        mx.array(latents[rows, columns].astype(np.float32)),
        mx.array(columns.astype(np.uint32)),
        mx.array(np.searchsorted(rows, np.arange(N + 1)).astype(np.uint32)),
    )
    assert metrics.l0(ragged).item() == pytest.approx(metrics.l0(code).item(), rel=1e-6)
    np.testing.assert_array_equal(
        np.array(metrics.fire_counts(ragged, D_SAE)), np.array(metrics.fire_counts(code, D_SAE))
    )


def test_perfect_and_mean_reconstruction() -> None:
    x = mx.random.normal((100, 5), key=mx.random.key(0))
    assert metrics.fvu(x, x).item() == 0
    assert metrics.fvu(x, mx.broadcast_to(x.mean(axis=0), x.shape)).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 7, 93, 100]])
def test_streaming_equals_the_whole_set(data: tuple, sizes: list[int]) -> None:
    x, x_hat, code = data
    evaluation = metrics.Evaluation(D_SAE)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        evaluation.update(mx.array(x[rows]), mx.array(x_hat[rows]), SparseCode(*(a[rows] for a in code)))
        start += size
    got, latents = evaluation.result(), dense64(code)
    assert got["n_tokens"] == N
    assert got["fvu"] == pytest.approx(fvu64(x, x_hat), rel=1e-6)
    assert got["explained_variance"] == 1 - got["fvu"]
    assert got["mse"] == pytest.approx(((x.astype(np.float64) - x_hat) ** 2).sum(1).mean(), rel=1e-6)
    assert got["nmse"] == pytest.approx((((x - x_hat) ** 2).sum(1) / (x**2).sum(1)).mean(), rel=1e-5)
    assert got["l0"] == pytest.approx((latents > 0).sum(1).mean(), rel=1e-12)
    assert got["dead_fraction"] == ((latents > 0).sum(0) == 0).mean()
    np.testing.assert_allclose(
        evaluation.reconstruction.mean, x.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(evaluation.fired.fire_rate, (latents > 0).mean(0))


def test_streaming_keeps_digits_where_the_mean_dwarfs_the_spread() -> None:
    """E[x^2] - E[x]^2 in float32 would be garbage here: the mean is 100,000 times the spread, in 60 drifting
    batches.
    """
    rng = np.random.default_rng(1)
    x = (10_000 + 0.1 * rng.normal(size=(60, 50, 8)) + 0.005 * np.arange(60)[:, None, None]).astype(
        np.float32
    )
    x_hat = (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32)
    meter = metrics.Reconstruction()
    for a, b in zip(x, x_hat, strict=True):
        meter.update(mx.array(a), mx.array(b))
    expected = fvu64(x.reshape(-1, 8), x_hat.reshape(-1, 8))
    assert meter.result()["fvu"] == pytest.approx(expected, rel=1e-3)
    naive = np.float32((x_hat - x).ravel() @ (x_hat - x).ravel()) / (
        np.square(x).mean(dtype=np.float32) - np.square(x.mean(dtype=np.float32))
    )
    assert naive != pytest.approx(expected * x.size, rel=0.5)  # the trap is real


def test_streaming_keeps_digits_in_batches_of_any_size() -> None:
    """The mean of a batch is 1e6 or more times the spread: float32 holds it to a sixteenth at best."""
    rng = np.random.default_rng(1)
    x = (1e6 * np.arange(1, 5) + rng.normal(size=(1000, 4))).astype(np.float32)
    x_hat = x + np.float32(0.25)
    meter = metrics.Reconstruction()
    for rows in np.split(np.arange(1000), [1, 3, 500, 501]):
        meter.update(mx.array(x[rows]), mx.array(x_hat[rows]))
    assert meter.result()["fvu"] == pytest.approx(fvu64(x, x_hat), rel=1e-6)
    np.testing.assert_allclose(meter.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)


@pytest.mark.parametrize("shape", [(10, 1), (1, 8), (5, 8), (8,)])
def test_a_reconstruction_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[Reconstruction\] x and x_hat must have one shape \[..., d\]"):
        metrics.Reconstruction().update(mx.ones((10, 8)), mx.ones(shape))
    metrics.Reconstruction().update(mx.ones((2, 5, 8)), mx.ones((10, 8)))


def test_mean_of_batch_fvus_is_not_the_fvu() -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=(50, 4)), 5 + rng.normal(size=(50, 4))]).astype(np.float32)
    x_hat = x + 0.5
    meter = metrics.Reconstruction()
    for half in (slice(0, 50), slice(50, 100)):
        meter.update(mx.array(x[half]), mx.array(x_hat[half]))
    batchwise = np.mean([fvu64(x[:50], x_hat[:50]), fvu64(x[50:], x_hat[50:])])
    assert meter.result()["fvu"] == pytest.approx(fvu64(x, x_hat), rel=1e-5)
    assert batchwise > 2 * meter.result()["fvu"]


def test_equal_tokens_have_no_variance() -> None:
    """Not what the rounding of their mean leaves over."""
    x = mx.contiguous(mx.broadcast_to(10 + 3 * mx.random.normal((1, 16)), (5000, 16)))
    whole = metrics.Reconstruction()
    for part in mx.split(x, 5):
        whole.update(part, part + 0.1)
    assert metrics.fvu(x, x + 0.1).item() == whole.result()["fvu"] == np.inf
    assert sum_about_mean(x).item() == 0
    mean, std = column_statistics(x)
    np.testing.assert_array_equal(np.array(mean), np.array(x[0]))
    np.testing.assert_array_equal(np.array(std), 1)
    far = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float32) + 3000
    wanted = np.square(far - far.mean(axis=0, dtype=np.float64)).sum()
    assert sum_about_mean(mx.array(far)).item() == pytest.approx(wanted, rel=1e-5)
    assert 2e5 / metrics.fvu(mx.array(far), mx.array(far + 1)).item() * 0.8 == pytest.approx(wanted, rel=1e-4)


def test_a_batch_without_tokens_changes_nothing() -> None:
    x = mx.random.normal((40, 4))
    found = []
    for parts in ([x], [x[:0], x[:30], x[:0], x[30:]]):
        whole = metrics.Reconstruction()
        for part in parts:
            whole.update(part, 0.9 * part)
        found.append(whole.result())
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_loss_recovered() -> None:
    assert metrics.ce_loss_recovered(2.0, 2.0, 5.0) == 1
    assert metrics.ce_loss_recovered(2.0, 5.0, 5.0) == 0
    meter = metrics.LossRecovered()
    meter.update(10, clean=20.0, sae=mx.array(21.0), zero=60.0, mean=40.0)
    meter.update(30, clean=60.0, sae=62.0, zero=180.0, mean=120.0)
    got = meter.result()
    assert got["ce_clean"] == 2.0
    assert got["ce_sae"] == pytest.approx(83 / 40)
    assert got["loss_recovered_zero"] == pytest.approx((6 - 83 / 40) / 4)
    assert got["loss_recovered_mean"] == pytest.approx((4 - 83 / 40) / 2)
    with pytest.raises(ValueError, match=r"\[LossRecovered\] every batch must give"):
        meter.update(1, clean=1.0, sae=1.0)
    with pytest.raises(ValueError, match=r"\[LossRecovered\] sums must contain clean and sae"):
        metrics.LossRecovered().update(1, zero=1.0)


def test_an_ablation_that_costs_nothing_leaves_nothing_to_recover() -> None:
    """One token: its mean is itself."""
    assert np.isnan(metrics.ce_loss_recovered(2.0, 2.0, 2.0))
    assert metrics.ce_loss_recovered(2.0, 2.5, 2.0) == -np.inf
    meter = metrics.LossRecovered()
    meter.update(1, clean=1.5, sae=1.5, zero=3.0, mean=1.5)
    got = meter.result()
    assert got["loss_recovered_zero"] == 1
    assert np.isnan(got["loss_recovered_mean"])


def test_throughput_counts_tokens_against_the_clock() -> None:
    now = [10.0]
    meter = metrics.Throughput(lambda: now[0])
    meter.update(500)
    now[0] += 2
    meter.update(500)
    assert meter.tokens_per_s == 500
    meter.restart()
    now[0] += 1
    assert meter.tokens_per_s == 0


def test_evaluate_runs_a_module_over_batches() -> None:
    module, x = SAE(8, 32, k=4, seed=0), mx.random.normal((64, 8), key=mx.random.key(1))
    got = metrics.evaluate(module, [x[:40], x[40:]])
    assert got["fvu"] == pytest.approx(metrics.fvu(x, module(x)).item(), rel=1e-5)
    coder = SAE(8, 32, k=4, d_out=3, seed=0)
    y = mx.random.normal((64, 3), key=mx.random.key(2))
    assert metrics.evaluate(coder, [(x, y)])["fvu"] == pytest.approx(
        metrics.fvu(y, coder(x)).item(), rel=1e-5
    )
    deep = metrics.evaluate(module, [x.reshape(4, 16, 8)])
    assert deep == pytest.approx(got, rel=1e-5)


def test_sources_given_apart_are_one_token() -> None:
    """Each coordinate of each source has a mean of its own."""
    x = mx.random.normal((60, 2, 4)) + mx.array([[3.0], [-5.0]])
    y = 2 * mx.random.normal((60, 2, 4)) + mx.array([[-1.0], [4.0]])
    coder = Crosscoder(4, 2, 32, k=4, seed=0)
    across = CrossLayerTranscoder(4, 2, 16, k=4, seed=0)
    for module, target in ((coder, x), (across, y)):
        y_hat = np.array(module(x)).reshape(60, 8)
        wanted = fvu64(np.array(target).reshape(60, 8), y_hat)
        got = metrics.evaluate(module, [(x[:20], target[:20]), (x[20:], target[20:])])
        assert got["fvu"] == pytest.approx(wanted, rel=1e-5)
        flat = [(x.reshape(60, 8), target.reshape(60, 8))]
        assert got == pytest.approx(metrics.evaluate(module, flat), rel=1e-5)
        assert got["mse"] == pytest.approx(
            np.square(np.array(target).reshape(60, 8) - y_hat).sum(1).mean(), rel=1e-5
        )


def test_a_transcoder_is_not_judged_by_its_input() -> None:
    coder, x = SAE(8, 32, k=4, d_out=8, seed=0), mx.random.normal((64, 8))
    with pytest.raises(ValueError, match=r"\[evaluate\] batches of a transcoder must be tuples"):
        metrics.evaluate(coder, [x])
    assert metrics.evaluate(coder, [(x, x)])["n_tokens"] == 64


def test_latents_of_another_sae_are_refused() -> None:
    """They were counted for others, or written past the end."""
    dense = DenseCode(mx.ones((10, 64)))
    with pytest.raises(
        ValueError, match=r"\[fire_counts\] values must have shape \[..., 32\] but got \(10, 64\)"
    ):
        metrics.fire_counts(dense, 32)
    np.testing.assert_array_equal(np.array(metrics.fire_counts(dense, 64)), 10)
    meter = metrics.FireCounter(4)
    meter.update(SparseCode(mx.array([[1.0, 0.0]]), mx.array([[3, 9]], mx.uint32)))  # 9 does not fire
    for index in (4, 400_000_000):
        code = SparseCode(mx.ones((3, 2)), mx.array([[1, index]] * 3, mx.uint32))
        assert metrics.fire_counts(code, 4).tolist() == [0, 3, 0, 0]
        with pytest.raises(ValueError, match=r"\[FireCounter\] latents must be below d_sae=4 but 3 firings"):
            meter.update(code)
    assert (meter.n, meter.counts.tolist()) == (1, [0, 0, 0, 1])


@pytest.mark.parametrize("meter", [metrics.Reconstruction(), metrics.FireCounter(4), metrics.LossRecovered()])
def test_no_tokens_no_result(meter: object) -> None:
    with pytest.raises(ValueError, match="there must be at least one token but got none"):
        meter.result()


def test_nan_is_seen() -> None:
    x = mx.array([[1.0, 2.0], [3.0, 5.0]])
    meter = metrics.Reconstruction()
    meter.update(x, mx.array([[1.0, float("nan")], [3.0, 5.0]]))
    assert np.isnan(meter.result()["fvu"])
    assert np.isnan(metrics.fvu(x, x * float("nan")).item())
