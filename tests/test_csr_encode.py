"""batch_topk_encode and threshold_encode: the oracle, the fallback, ties, hints, adversarial orders, derivatives."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from mlxsae import SparseCodeCSR, ops, to_dense
from tools import DTYPES, array, finite_difference, graph_of, numpy

SHAPES = [  # n, d_in, d_sae, k: odd tails everywhere
    (1, 1, 1, 1),
    (1, 31, 33, 1),
    (2, 48, 1000, 33),
    (31, 33, 48, 48),
    (64, 64, 4096, 32),
    (130, 17, 9000, 5),
    (257, 32, 700, 1),
    (5, 2100, 300, 9),
]


def problem(rng, n, d_in, d_sae, dtype=mx.float32):
    x = array(rng.standard_normal((n, d_in)), dtype)
    w = array(rng.standard_normal((d_sae, d_in)) / np.sqrt(d_in), dtype)
    return x, w, array(0.1 * rng.standard_normal(d_sae), dtype)


def integers(rng, n, d_in, d_sae, spread):
    """Small integers: every product is exact and full of ties, so the oracle's choice is the only right one."""
    x = rng.integers(-spread, spread + 1, (n, d_in)).astype(np.float32)
    return x, rng.integers(-spread, spread + 1, (d_sae, d_in)).astype(np.float32)


def equal_codes(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))


def well_formed(code, n):
    values, indices, offsets = (
        numpy(code.values),
        np.array(code.indices).astype(np.int64),
        np.array(code.offsets),
    )
    assert isinstance(code, SparseCodeCSR)
    assert (code.indices.dtype, code.offsets.dtype) == (mx.uint32, mx.int64)
    assert (len(offsets), offsets[0]) == (n + 1, 0)
    assert (np.diff(offsets) >= 0).all()
    for t in range(n):
        assert (np.diff(indices[offsets[t] : offsets[t + 1]]) > 0).all(), "indices ascend in each row"
    assert (values[: offsets[-1]] > 0).all()
    assert not values[offsets[-1] :].any()
    assert not indices[offsets[-1] :].any()
    rows = np.repeat(np.arange(n), np.diff(offsets))
    return values[: offsets[-1]], indices[: offsets[-1]], rows


def check_batch(x, w, b, k, code, threshold):
    """Against the oracle; the choice may differ only where the float64 gap is below the float32 error bound."""
    xs, ws, bs = numpy(x), numpy(w), None if b is None else numpy(b)
    n = x.shape[0]
    want, *_, want_threshold, z = oracle.batch_topk_encode(xs, ws, bs, k)
    bound = oracle.float32_error_bound(xs, ws, bs)
    assert code.values.shape == code.indices.shape == (k * n,)
    values, indices, rows = well_formed(code, n)
    kept = np.zeros(z.shape, bool)
    kept[rows, indices] = True
    assert np.where(kept, z + bound, np.inf).min() >= max(
        0, np.where(kept, -np.inf, z - bound).max(initial=-np.inf)
    )
    if len(values) < k * n:  # room to spare: everything positive was kept
        assert (z[~kept] <= bound[~kept]).all()
    assert abs(len(values) - len(want)) <= (np.abs(z) <= bound).sum()
    name = str(code.values.dtype).split(".")[-1]
    np.testing.assert_allclose(values, z[rows, indices], rtol=oracle.RTOL[name], atol=2e-6 * np.abs(z).max())
    assert (threshold.dtype, threshold.shape) == (mx.float32, ())
    np.testing.assert_allclose(threshold.item(), want_threshold, atol=2 * bound.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_batch_equals_the_oracle(n, d_in, d_sae, k, dtype):
    x, w, b = problem(np.random.default_rng(n * d_sae), n, d_in, d_sae, dtype)
    code, threshold = ops.batch_topk_encode(x, w, b, k=k)
    assert code.values.dtype == dtype
    check_batch(x, w, b, k, code, threshold)
    check_batch(x, w, None, k, *ops.batch_topk_encode(x, w, k=k))
    check_batch(x, w, b, k, *graph_of(ops.batch_topk_encode, x, w, b, k=k))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 90), st.sampled_from([1, 3, 31, 33]), st.integers(1, 3000), st.data())
def test_batch_any_shape(n, d_in, d_sae, data):
    k = data.draw(st.integers(1, min(d_sae, 70)))
    x, w, b = problem(np.random.default_rng(d_sae), n, d_in, d_sae)
    code, threshold = ops.batch_topk_encode(x, w, b, k=k)
    if n == 0:
        plain, plain_threshold = graph_of(ops.batch_topk_encode, x, w, b, k=k)
        for arrays in ((*code, threshold), (*plain, plain_threshold)):
            assert [a.tolist() for a in arrays] == [[], [], [0], 0.0]
    else:
        check_batch(x, w, b, k, code, threshold)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.sampled_from([40, 700, 5000]), st.integers(1, 40), st.integers(0, 3))
def test_batch_ties_go_to_the_lowest_place(n, d_sae, k, spread):
    x, w = integers(np.random.default_rng(n * d_sae + k), n, 8, d_sae, spread)
    values, indices, offsets, threshold, _ = oracle.batch_topk_encode(x, w, None, k)
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        code, got = run(ops.batch_topk_encode, mx.array(x), mx.array(w), k=k)
        m = len(values)
        equal_codes(
            (code.values[:m], code.indices[:m], code.offsets, got), (values, indices, offsets, threshold)
        )
        well_formed(code, n)


@pytest.mark.parametrize("hint", [0.0, -1.0, 1e-30, 1.0, 2.6, 2.7, 1e30, np.inf, np.nan])
def test_no_result_depends_on_the_hint(hint):
    x, w, b = problem(np.random.default_rng(0), 150, 32, 6000)
    want, threshold = ops.batch_topk_encode(x, w, b, k=20)
    got, again = ops.batch_topk_encode(x, w, b, k=20, hint=mx.array(hint))
    equal_codes((*got, again), (*want, threshold))
    got, again = ops.batch_topk_encode(x, w, b, k=20, hint=threshold)
    equal_codes((*got, again), (*want, threshold))


@pytest.mark.parametrize("hint", [None, 1.0])
@pytest.mark.parametrize(
    "order", ["ascending", "descending", "equal", "negative", "few", "one row", "late", "early"]
)
def test_batch_adversarial_orders(order, hint):
    """The sample of features misleads, or everything is a tie at the edge; nothing may be lost, nor any memory."""
    n, d_sae, k = 70, 9000, 11
    j = np.arange(d_sae)
    score = {
        "ascending": 1 + j,
        "descending": 1 + j[::-1],
        "equal": np.ones(d_sae),
        "negative": -1.0 - j % 7,
        "few": np.where(j % 1000 == 999, 1.0, -1.0),
        "one row": 1 + j % 3,
        "late": np.where(j < 600, 1000.0, 1.0) * (j % 50 == 0),
        "early": np.where(j < 10, 1.0 + j, -1.0),  # plenty in the sample, fewer than k in all
    }[order]
    w = np.zeros((d_sae, 4), np.float32)
    w[:, 0] = score
    x = np.ones((n, 4), np.float32)
    if order == "one row":
        x[:, 0] = np.where(np.arange(n) == 33, 5, 0)
    values, indices, offsets, threshold, _ = oracle.batch_topk_encode(x, w, None, k)
    code, got = ops.batch_topk_encode(
        mx.array(x), mx.array(w), k=k, hint=None if hint is None else mx.array(hint)
    )
    m = len(values)
    equal_codes((code.values[:m], code.indices[:m], code.offsets, got), (values, indices, offsets, threshold))
    well_formed(code, n)


def test_nan_and_infinity():
    """NaN is the largest, infinity next; the threshold is the smallest of what is kept."""
    x = np.array([[np.nan, 0], [1, 0], [np.inf, 1], [-np.inf, 1]], np.float32)
    w = mx.array([[1.0, 0], [0.5, 0], [0.0, 1], [-1.0, 2]])
    z = oracle.pre_acts(x, np.array(w))
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        code, threshold = run(ops.batch_topk_encode, mx.array(x), w, k=1)
        assert np.array(code.offsets).tolist() == [0, 4, 4, 4, 4]
        assert np.isnan(np.array(code.values)).all()
        assert np.isnan(threshold.item())
        code, threshold = run(ops.batch_topk_encode, mx.array(x), w, k=4)
        used = np.array(code.offsets)[-1]
        assert used == (np.isnan(z) | (z > 0)).sum()
        assert threshold.item() == np.nanmin(np.where(z > 0, z, np.nan))
        code = run(ops.threshold_encode, mx.array(x), w, threshold=mx.array(1.0))
        assert np.array(code.offsets)[-1] == (np.isnan(z) | (z > 1)).sum()


def thresholds(rng, d_sae):
    return rng.choice([-1.0, 0.0, 0.3, 1.0, 2.5, np.inf], d_sae)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize(("n", "d_in", "d_sae"), [s[:3] for s in SHAPES] + [(0, 3, 5)])
def test_threshold_equals_the_oracle(n, d_in, d_sae, scalar, dtype):
    rng = np.random.default_rng(n * d_sae)
    x, w, b = problem(rng, n, d_in, d_sae, dtype)
    theta = np.float32(0.7) if scalar else thresholds(rng, d_sae).astype(np.float32)
    z = oracle.pre_acts(numpy(x), numpy(w), numpy(b))
    bound = oracle.float32_error_bound(numpy(x), numpy(w), numpy(b))
    clear = np.abs(z - np.maximum(theta, 0)) > bound
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        code = run(ops.threshold_encode, x, w, b, threshold=mx.array(theta))
        assert code.values.dtype == dtype
        values, indices, rows = well_formed(code, n)
        assert len(values) == code.values.shape[0], "no entry is left over"
        kept = np.zeros(z.shape, bool)
        kept[rows, indices] = True
        assert (kept == ((z > theta) & (z > 0)))[clear].all()
        name = str(dtype).split(".")[-1]
        np.testing.assert_allclose(
            values, z[rows, indices], rtol=oracle.RTOL[name], atol=2e-6 * np.abs(z).max(initial=1)
        )


def test_threshold_is_strict():
    x, w = integers(np.random.default_rng(0), 50, 8, 600, 2)
    for theta in (np.float32(3), np.random.default_rng(1).integers(-2, 6, 600).astype(np.float32)):
        for run in (lambda f, *a, **q: f(*a, **q), graph_of):
            code = run(ops.threshold_encode, mx.array(x), mx.array(w), threshold=mx.array(theta))
            equal_codes(code, oracle.threshold_encode(x, w, None, theta))


@pytest.mark.parametrize("theta", [np.float32(np.nan), np.float32([1, np.nan, -np.inf, np.inf])])
def test_a_threshold_of_nan_is_seen(theta):
    """Its feature is NaN in every row, also where the pre-activation is negative."""
    x, w = integers(np.random.default_rng(0), 6, 3, 4, 2)
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        code = run(ops.threshold_encode, mx.array(x), mx.array(w), threshold=mx.array(theta))
        equal_codes(code, oracle.threshold_encode(x, w, None, theta))
        assert np.isnan(np.array(code.values)).sum() == 6 * np.isnan(np.broadcast_to(theta, 4)).sum()


@pytest.mark.parametrize("n", [3, 400])
def test_threshold_with_more_entries_than_expected(n):
    """All 700 features fire on every row: more than the first guess of 256 has room for."""
    x, w = np.ones((n, 2), np.float32), np.ones((700, 2), np.float32)
    code = ops.threshold_encode(mx.array(x), mx.array(w), threshold=mx.array(0.5))
    equal_codes(code, oracle.threshold_encode(x, w, None, 0.5))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.sampled_from([1, 40, 700]), st.floats(0, 1.2), st.integers(0, 6))
def test_capacity(n, d_sae, share, theta):
    """Of too many entries the first by row and feature are kept, and the flag tells."""
    x, w = integers(np.random.default_rng(n + d_sae), n, 4, d_sae, 2)
    values, indices, offsets = oracle.threshold_encode(x, w, None, theta)
    capacity = int(share * len(values))
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        code, overflow = run(
            ops.threshold_encode_capped,
            mx.array(x),
            mx.array(w),
            threshold=mx.array(float(theta)),
            capacity=capacity,
        )
        m = min(capacity, len(values))
        assert overflow.item() == (len(values) > capacity)
        assert code.values.shape == (capacity,)
        equal_codes(
            (code.values[:m], code.indices[:m], code.offsets),
            (values[:m], indices[:m], np.minimum(offsets, capacity)),
        )
        well_formed(code, n)


def encoders():
    return [
        lambda x, w, b: ops.batch_topk_encode(x, w, b, k=3)[0],
        lambda x, w, b: ops.threshold_encode(x, w, b, threshold=mx.array(0.6)),
        lambda x, w, b: ops.threshold_encode_capped(x, w, b, threshold=mx.array(0.6), capacity=60)[0],
    ]


@pytest.mark.parametrize("which", range(3))
def test_derivatives(which):
    rng = np.random.default_rng(0)
    n, d_in, d_sae, d_out = 6, 4, 12, 3
    f = encoders()[which]
    args = [
        rng.standard_normal((n, d_in)),
        rng.standard_normal((d_sae, d_in)),
        0.1 * rng.standard_normal(d_sae),
    ]
    w_dec, c = rng.standard_normal((d_sae, d_out)), rng.standard_normal((n, d_out))
    primals = [mx.array(a, mx.float32) for a in args]
    tangents = [mx.array(rng.standard_normal(a.shape), mx.float32) for a in args]

    def loss(*a):
        return mx.sum(ops.sparse_decode(f(*a), mx.array(w_dec, mx.float32)) * mx.array(c, mx.float32))

    def loss64(x, w, b):
        code = (
            oracle.batch_topk_encode(x, w, b, 3)[:3] if which == 0 else oracle.threshold_encode(x, w, b, 0.6)
        )
        return (oracle.sparse_decode(*oracle.csr_to_slots(*code), w_dec) * c).sum()

    for run in (lambda g: g(), graph_of):
        grads = run(lambda: mx.grad(loss, argnums=[0, 1, 2])(*primals))
        for q, g in enumerate(grads):
            want = finite_difference(loss64, args, q)
            np.testing.assert_allclose(np.array(g), want, rtol=1e-4, atol=1e-4)
    (_,), (dot,) = mx.jvp(loss, primals, tangents)
    forward = sum(mx.sum(g * t).item() for g, t in zip(grads, tangents, strict=True))
    np.testing.assert_allclose(dot.item(), forward, rtol=1e-4)


def test_unused_entries_have_no_gradient():
    x, w = mx.ones((3, 2)), mx.array([[1.0, 0], [-1.0, 0], [0.0, -1]])
    grad = mx.grad(lambda w: mx.sum(ops.batch_topk_encode(x, w, k=3)[0].values))(w)
    assert grad.tolist() == [[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]


def one_code():
    capped = lambda x, w, b: ops.threshold_encode_capped(x, w, b, threshold=mx.array(0.3), capacity=4000)[0]  # noqa: E731
    return [
        lambda x, w, b: ops.topk_encode(x, w, b, k=3),
        lambda x, w, b: ops.batch_topk_encode(x, w, b, k=3)[0],
        capped,
        lambda x, w, b: capped(x, w, None),
    ]


@pytest.mark.parametrize("which", range(4))
def test_compiled_once_for_any_number_of_rows(which):
    """Constants keep the shapes of the first call: none may have the shape that another call needs."""
    rng = np.random.default_rng(0)
    _, w, b = problem(rng, 1, 8, 90)
    encode = one_code()[which]
    gradients = mx.grad(lambda w, b, x: encode(x, w, b).values.square().sum(), argnums=(0, 1))
    for f in (lambda w, b, x: tuple(encode(x, w, b)), gradients):
        compiled = mx.compile(f, shapeless=True)
        for n in (20, 7, 600):
            x = array(rng.standard_normal((n, 8)), mx.float32)
            for got, want in zip(compiled(w, b, x), f(w, b, x), strict=True):
                np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5, atol=1e-5)


def test_compile_and_vmap():
    x, w, b = problem(np.random.default_rng(0), 12, 8, 40)
    xs = mx.stack([x, 2 * x, -x])
    for f in (
        lambda x: ops.batch_topk_encode(x, w, b, k=4, hint=mx.array(1.0)),
        lambda x: ops.threshold_encode_capped(x, w, b, threshold=mx.array(0.5), capacity=80),
    ):
        code, extra = mx.compile(f)(x)
        assert isinstance(code, SparseCodeCSR)
        want, want_extra = f(x)
        equal_codes((*code, extra), (*want, want_extra))
        code, extra = mx.vmap(f)(xs)
        for q in range(3):
            want, want_extra = f(xs[q])
            equal_codes((*(a[q] for a in code), extra[q]), (*want, want_extra))


def test_a_code_of_unknown_size_is_refused_within_a_transformation():
    x, w, _ = problem(np.random.default_rng(0), 12, 8, 40)
    for run in (mx.compile, lambda f: lambda x: mx.vmap(f)(x[None])):
        with pytest.raises(ValueError, match="within them use threshold_encode_capped"):
            run(lambda x: ops.threshold_encode(x, w, threshold=mx.array(0.5)).values)(x)


def test_one_batch_of_one_row_is_topk():
    x, w, b = problem(np.random.default_rng(0), 1, 64, 5000)
    code, _ = ops.batch_topk_encode(x, w, b, k=40)
    topk = ops.topk_encode(x, w, b, k=40)
    equal_codes((code.values, code.indices), (topk.values[0], topk.indices[0]))


def test_threshold_encode_at_the_threshold_of_the_batch():
    """At inference a token gets what is above the batch's threshold: all but the smallest entry itself."""
    x, w, b = problem(np.random.default_rng(0), 60, 16, 900)
    code, threshold = ops.batch_topk_encode(x, w, b, k=7)
    again = ops.threshold_encode(x, w, b, threshold=threshold)
    assert again.values.shape[0] == 60 * 7 - 1
    difference = np.array(to_dense(code, 900) - to_dense(again, 900))
    assert np.count_nonzero(difference) == 1
    assert difference.max() == np.float32(threshold.item())


def test_strided_and_transposed_inputs():
    x, w, b = problem(np.random.default_rng(0), 40, 16, 300)
    want, threshold = ops.batch_topk_encode(x, w, b, k=5)
    odd_x = mx.stack([x, x], axis=2)[:, :, 0]
    got, same = ops.batch_topk_encode(odd_x, mx.contiguous(w.T).T, b[::-1][::-1], k=5)
    equal_codes((*got, same), (*want, threshold))


PROGRAM = """
import hashlib, mlx.core as mx, numpy as np
from mlxsae import ops
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for n, d, d_sae in [(3, 40, 5000), (300, 40, 3000)]:
    x, w = (mx.array(rng.standard_normal(s), mx.float32) for s in ((n, d), (d_sae, d)))
    code, threshold = ops.batch_topk_encode(x, w, k=9)
    ties, _ = ops.batch_topk_encode(mx.round(x), mx.round(w), k=9)
    flat, _ = ops.batch_topk_encode(mx.ones_like(x), mx.ones_like(w), k=9)
    theta, _ = ops.threshold_encode_capped(x, w, threshold=threshold, capacity=5 * n)
    out = ops.sparse_decode(code, w)
    outer = ops.sparse_outer(code, x, d_sae=d_sae)
    for a in (*code, threshold, *ties, *flat, *theta, out, outer):
        digest.update(np.array(a).tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_for_any_number_of_threads():
    def run(threads):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "MLXSAE_NUM_THREADS": str(threads)},
        )
        return out.stdout

    assert run(1) == run(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.batch_topk_encode(x, w, k=0), "k must be in (0, d_sae] but got k=0 with d_sae=20"),
        (lambda x, w: ops.batch_topk_encode(x, w, k=21), "k must be in (0, d_sae]"),
        (lambda x, w: ops.batch_topk_encode(x[0], w, k=2), "[batch_topk_encode] x must have 2 dimensions"),
        (lambda x, w: ops.batch_topk_encode(x[:, :3], w, k=2), "must share d_in"),
        (lambda x, w: ops.batch_topk_encode(x, w, mx.zeros(3), k=2), "b_enc must have shape [d_sae] = [20]"),
        (lambda x, w: ops.batch_topk_encode(x, w, k=2, hint=mx.zeros(2)), "hint must be one number"),
        (lambda x, w: ops.threshold_encode(x[0], w, threshold=mx.array(0.0)), "[threshold_encode] x must have 2"),
        (lambda x, w: ops.threshold_encode(x, w, threshold=mx.zeros(3)), "threshold must be one number or of shape [d_sae] = [20]"),
        (lambda x, w: ops.threshold_encode(x, w, threshold=mx.array(1)), "threshold must be float32"),
        (lambda x, w: ops.threshold_encode_capped(x, w, threshold=mx.array(1.0), capacity=-1), "capacity must be in"),
    ],
)  # fmt: skip
def test_malformed(call, message):
    with pytest.raises(ValueError) as e:
        call(mx.zeros((5, 6)), mx.zeros((20, 6)))
    assert message in str(e.value)


@pytest.mark.parametrize("x", [[[1.0, 2.0]], None, 3.0])
def test_what_is_no_array(x: object) -> None:
    for encode in (ops.threshold_encode, partial(ops.threshold_encode_capped, capacity=4)):
        with pytest.raises(TypeError):
            encode(x, mx.ones((4, 2)), threshold=mx.array(0.0))
