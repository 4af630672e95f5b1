"""sparse_decode, gather_dot, sparse_outer, decode_residual and the dead-feature counter, against the oracle."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from mlxsae import SparseCode, SparseCodeCSR, ops, to_dense
from mlxsae.code import DenseCode
from tools import DTYPES, array, finite_difference, graph_of, numpy

SHAPES = [
    (1, 1, 1, 1),
    (2, 31, 33, 1),
    (31, 33, 48, 48),
    (33, 1000, 31, 7),
    (64, 48, 1000, 32),
    (5, 32, 2, 2),
]


def problem(rng, n, d, d_sae, k, dtype):
    indices = np.sort(np.stack([rng.permutation(d_sae)[:k] for _ in range(n)]), axis=1).astype(np.uint32)
    values = rng.standard_normal((n, k)) * (rng.random((n, k)) > 0.3)  # some slots unused, some negative
    code = SparseCode(array(values, dtype), mx.array(indices))
    return code, array(rng.standard_normal((d_sae, d)), dtype), array(rng.standard_normal((n, d)), dtype)


def close(got, want, dtype, scale=None):
    name = str(dtype).split(".")[-1]
    scale = np.abs(want).max(initial=1e-30) if scale is None else scale
    assert got.dtype == dtype
    np.testing.assert_allclose(numpy(got), want, rtol=oracle.RTOL[name], atol=oracle.RTOL[name] * 0.1 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "d_sae", "k"), SHAPES)
def test_equal_the_oracle(n, d, d_sae, k, dtype):
    rng = np.random.default_rng(n + d_sae)
    code, w, rows = problem(rng, n, d, d_sae, k, dtype)
    bias = array(rng.standard_normal(d), dtype)
    v, i, w64, r64 = numpy(code.values), np.array(code.indices), numpy(w), numpy(rows)
    close(ops.sparse_decode(code, w, bias), oracle.sparse_decode(v, i, w64, numpy(bias)), dtype)
    close(ops.sparse_decode(code, w), oracle.sparse_decode(v, i, w64), dtype)
    close(ops.gather_dot(rows, w, code.indices), oracle.gather_dot(r64, w64, i), dtype)
    close(ops.sparse_outer(code, rows, d_sae=d_sae), oracle.sparse_outer(v, i, r64, d_sae), dtype)
    residual, square = ops.decode_residual(code, w, rows, bias)
    want = oracle.sparse_decode(v, i, w64, numpy(bias)) - r64
    if dtype == mx.float32:
        close(residual, want, dtype)
        close(square, (want**2).sum(1), dtype)
    np.testing.assert_allclose(numpy(to_dense(code, d_sae)), oracle.to_dense(v, i, d_sae))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.sampled_from([1, 15, 16, 17, 31, 64, 100]), st.integers(1, 300), st.data())
def test_any_shape_kernel_equals_fallback(n, d, d_sae, data):
    k = data.draw(st.integers(1, min(d_sae, 40)))
    rng = np.random.default_rng(d_sae + n)
    if n == 0:
        code = SparseCode(mx.zeros((0, k)), mx.zeros((0, k), mx.uint32))
        w, rows = array(rng.standard_normal((d_sae, d)), mx.float32), mx.zeros((0, d))
    else:
        code, w, rows = problem(rng, n, d, d_sae, k, mx.float32)
    for got, want in [
        (ops.sparse_decode(code, w), graph_of(ops.sparse_decode, code, w)),
        (ops.gather_dot(rows, w, code.indices), graph_of(ops.gather_dot, rows, w, code.indices)),
        (ops.sparse_outer(code, rows, d_sae=d_sae), graph_of(ops.sparse_outer, code, rows, d_sae=d_sae)),
        (ops.decode_residual(code, w, rows)[1], graph_of(ops.decode_residual, code, w, rows)[1]),
    ]:
        assert got.shape == want.shape
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "d", "d_sae", "k"), [(100, 33, 60, 40), (130, 1100, 1030, 600), (64, 5000, 900, 500)]
)
def test_a_code_that_uses_few_features_often(n, d, d_sae, k):
    """It is decoded by a dense product, with the bits of the walk over its entries; not where rows are infinite."""
    rng = np.random.default_rng(n)
    code, w, rows = problem(rng, n, d, d_sae, k, mx.float32)
    bias = array(rng.standard_normal(d), mx.float32)
    residual, square = ops.decode_residual(code, w, rows, bias)
    want = oracle.sparse_decode(numpy(code.values), np.array(code.indices), numpy(w), numpy(bias)) - numpy(
        rows
    )
    close(residual, want, mx.float32)
    close(square, (want**2).sum(1), mx.float32)
    np.testing.assert_array_equal(np.array(residual), np.array(ops.sparse_decode(code, w, bias) - rows))
    row = code.indices[0, mx.argmax(mx.abs(code.values[0]))].item()
    w[row] = mx.array(np.inf)
    used = ((code.indices == row) & (code.values != 0)).any(axis=1)
    finite = mx.isfinite(ops.decode_residual(code, w, rows, bias)[1])
    np.testing.assert_array_equal(np.array(finite), np.array(mx.logical_not(used)))


def test_unused_slots_are_inert():
    """A value of 0 adds nothing, whatever its row holds, in the kernel and in the definition."""
    w = mx.array([[np.nan, np.inf], [1.0, 2.0]])
    code = SparseCode(mx.array([[0.0, 3.0]]), mx.array([[0, 1]], dtype=mx.uint32))
    for run in (lambda f, *a, **k: f(*a, **k), graph_of):
        assert run(ops.sparse_decode, code, w).tolist() == [[3.0, 6.0]]
        outer = run(ops.sparse_outer, code, mx.array([[1.0, np.inf]]), d_sae=2)
        assert outer.tolist() == [[0.0, 0.0], [3.0, np.inf]]


def test_derivatives_of_every_argument():
    rng = np.random.default_rng(0)
    n, d, d_sae, k = 4, 3, 9, 3
    code, w, rows = problem(rng, n, d, d_sae, k, mx.float32)
    v, i, w64, r64 = numpy(code.values), np.array(code.indices), numpy(w), numpy(rows)
    bias = rng.standard_normal(d)
    c1, c2, c3 = rng.standard_normal((n, d)), rng.standard_normal((n, k)), rng.standard_normal((d_sae, d))
    cases = [
        (
            lambda v, w, b: ops.sparse_decode(SparseCode(v, code.indices), w, b),
            lambda v, w, b: oracle.sparse_decode(v, i, w, b),
            [v, w64, bias],
            c1,
        ),
        (
            lambda r, w: ops.gather_dot(r, w, code.indices),
            lambda r, w: oracle.gather_dot(r, w, i),
            [r64, w64],
            c2,
        ),
        (
            lambda v, r: ops.sparse_outer(SparseCode(v, code.indices), r, d_sae=d_sae),
            lambda v, r: oracle.sparse_outer(v, i, r, d_sae),
            [v, r64],
            c3,
        ),
        (
            lambda v, w, y: ops.decode_residual(SparseCode(v, code.indices), w, y)[0],
            lambda v, w, y: oracle.sparse_decode(v, i, w) - y,
            [v, w64, r64],
            c1,
        ),
    ]
    for f, f64, args, c in cases:
        v_used = [a for a in args]
        v_used = [
            np.where(a == 0, 0.7, a) if a is v else a for a in args
        ]  # at 0 a slot is unused, not differentiable
        primals = [mx.array(a, mx.float32) for a in v_used]
        cot = mx.array(c, mx.float32)
        grads = mx.grad(lambda *a, f=f, cot=cot: mx.sum(f(*a) * cot), argnums=list(range(len(primals))))(
            *primals
        )
        tangents = [mx.array(rng.standard_normal(a.shape), mx.float32) for a in v_used]
        (_,), (dot,) = mx.jvp(lambda *a, f=f: f(*a), primals, tangents)
        want_dot = mx.sum(dot * cot).item()
        got_dot = sum(mx.sum(g * t).item() for g, t in zip(grads, tangents, strict=True))
        np.testing.assert_allclose(got_dot, want_dot, rtol=1e-4, atol=1e-4)
        for q, g in enumerate(grads):
            want = finite_difference(lambda *a, f64=f64, c=c: (f64(*a) * c).sum(), v_used, q)
            np.testing.assert_allclose(np.array(g), want, rtol=1e-4, atol=1e-4)


def test_vmap():
    rng = np.random.default_rng(0)
    codes, w, rows = zip(*(problem(rng, 5, 7, 11, 3, mx.float32) for _ in range(3)), strict=True)
    batch = SparseCode(mx.stack([c.values for c in codes]), mx.stack([c.indices for c in codes]))
    ws, rs = mx.stack(w), mx.stack(rows)
    cases = [
        (lambda c: ops.sparse_decode(c, w[0]), (batch,), lambda q: ops.sparse_decode(codes[q], w[0])),
        (ops.sparse_decode, (batch, ws), lambda q: ops.sparse_decode(codes[q], w[q])),
        (
            lambda r, c: ops.gather_dot(r, w[0], c.indices),
            (rs, batch),
            lambda q: ops.gather_dot(rows[q], w[0], codes[q].indices),
        ),
        (
            lambda r: ops.gather_dot(r, w[0], codes[0].indices),
            (rs,),
            lambda q: ops.gather_dot(rows[q], w[0], codes[0].indices),
        ),
        (
            lambda c, r: ops.sparse_outer(c, r, d_sae=11),
            (batch, rs),
            lambda q: ops.sparse_outer(codes[q], rows[q], d_sae=11),
        ),
        (
            lambda r: ops.sparse_outer(codes[1], r, d_sae=11),
            (rs,),
            lambda q: ops.sparse_outer(codes[1], rows[q], d_sae=11),
        ),
    ]
    for f, args, one in cases:
        out = mx.vmap(f)(*args)
        for q in range(3):
            np.testing.assert_allclose(np.array(out[q]), np.array(one(q)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="only CPU tasks look at the indices they are given")
@pytest.mark.parametrize("wrong", [11, 21, 2**32 - 5])
def test_vmap_refuses_indices_out_of_range(wrong):
    """The batch is one problem with a block of features for each element: none may reach into another's."""
    indices = mx.array([[[0, wrong]], [[1, 2]], [[3, 4]]], mx.uint32)
    out = mx.vmap(lambda i, r: ops.sparse_outer(SparseCode(mx.ones((1, 2)), i), r, d_sae=11))(
        indices, mx.ones((3, 1, 7))
    )
    with pytest.raises(RuntimeError, match="indices must be below"):
        mx.eval(out)


@pytest.mark.parametrize("csr", [False, True])
def test_vmap_over_nothing(csr):
    shape = (6,) if csr else (5, 2)
    offsets = mx.zeros(6, mx.int64)
    code = lambda v, i: SparseCodeCSR(v, i, offsets) if csr else SparseCode(v, i)  # noqa: E731
    values, indices = mx.zeros((0, *shape)), mx.zeros((0, *shape), mx.uint32)
    x, w = mx.zeros((0, 5, 7)), mx.zeros((11, 7))
    cases = [
        (lambda v, i: ops.sparse_decode(code(v, i), w), (values, indices), [(0, 5, 7)]),
        (lambda r, i: ops.gather_dot(r, w, code(i, i) if csr else i), (x, indices), [(0, *shape)]),
        (lambda v, i, r: ops.sparse_outer(code(v, i), r, d_sae=11), (values, indices, x), [(0, 11, 7)]),
        (lambda v, i, r: ops.decode_residual(code(v, i), w, r), (values, indices, x), [(0, 5, 7), (0, 5)]),
        (lambda x: ops.topk_encode(x, w, k=3), (x,), [(0, 5, 3)] * 2),
        (lambda x: tuple(ops.batch_topk_encode(x, w, k=3)[0]), (x,), [(0, 15), (0, 15), (0, 6)]),
    ]
    for f, args, want in cases:
        out = mx.vmap(f)(*args)
        assert [a.shape for a in (out if isinstance(out, tuple) else (out,))] == want
        mx.eval(out)


def test_code_keeps_its_type_through_transforms():
    x, w = mx.random.normal((4, 8)), mx.random.normal((20, 8))
    code = mx.compile(lambda x: ops.topk_encode(x, w, k=2))(x)
    assert isinstance(code, SparseCode)
    grad = mx.grad(lambda c: mx.sum(ops.sparse_decode(SparseCode(c, code.indices), w)))(code.values)
    assert grad.shape == code.values.shape


def test_results_meet_arrays_that_are_stored_the_other_way_round():
    """MLX walks two arrays in the order of their memory where their flags say that it is the same for both."""
    rng = np.random.default_rng(0)
    code, w, x = problem(rng, 5, 7, 33, 4, mx.float32)
    params = ops.Params(w, mx.zeros(33), w, mx.zeros(7))
    zeros = ops.Params(*map(mx.zeros_like, params))
    term = ops.Term(ops.decode_residual(code, w, x)[0], code, mx.array(1.0))
    updated = ops.feature_update(x, [term], params, zeros, zeros, loss=mx.array(1.0), lr=0.1, step=1)
    for result in (
        ops.topk_encode(x, w, k=3).values,
        ops.topk_encode(x, w, k=3).indices,
        ops.sparse_decode(code, w),
        ops.gather_dot(x, w, code.indices),
        ops.sparse_outer(code, x, d_sae=33),
        ops.decode_residual(code, w, x)[0],
        ops.encoder_shadow(w)[1],
        updated.params.w_enc,
        updated.m.w_enc,
    ):
        other = mx.contiguous(result.T).T
        mx.eval(other)
        assert mx.array_equal(result, other)
        assert mx.all(result - other == 0).item()
        np.testing.assert_array_equal(np.array(result * other), np.array(result) * np.array(other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_since_fired(dtype):
    rng = np.random.default_rng(0)
    for n, d_sae, k in [(1, 1, 1), (33, 100, 5), (64, 31, 31)]:
        code, _, _ = problem(rng, n, 1, d_sae, k, dtype)
        v = numpy(code.values)
        v[0, 0] = np.nan
        code = SparseCode(array(v, dtype), code.indices)
        counts = rng.integers(0, 1000, d_sae)
        counts[0] = 2**31 - 5
        want = oracle.tokens_since_fired(counts, v, np.array(code.indices), n)
        for run in (lambda f, *a, **q: f(*a, **q), graph_of):
            got = run(ops.update_tokens_since_fired, mx.array(counts, mx.int32), code)
            assert got.dtype == mx.int32
            np.testing.assert_array_equal(np.array(got), want)
    got = ops.update_tokens_since_fired(
        mx.zeros((31,), mx.int32), SparseCode(mx.zeros((2, 1)), mx.zeros((2, 1), mx.uint32)), n_tokens=7
    )
    assert got.tolist() == [7] * 31


def test_an_index_out_of_range_is_an_error_when_evaluated():
    code = SparseCode(mx.ones((2, 2)), mx.array([[0, 1], [2, 50]], dtype=mx.uint32))
    with pytest.raises(RuntimeError, match=r"indices must be below d_sae=20 but got 50"):
        mx.eval(ops.sparse_decode(code, mx.zeros((20, 4))))
    mx.eval(ops.sparse_decode(code, mx.zeros((51, 4))))  # the stream works on
    for wrong in (-1, 2**32 + 1, -(2**32)):  # not what 32 bits are left with
        code = SparseCode(mx.ones((1, 1)), mx.array([[wrong]], mx.int64))
        with pytest.raises(RuntimeError, match="indices must be below d_sae=20"):
            mx.eval(ops.sparse_decode(code, mx.zeros((20, 4))))


def fired(code, counts=None, **options):
    counts = mx.zeros(20, mx.int32) if counts is None else counts
    return ops.update_tokens_since_fired(counts, code, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, w: ops.sparse_decode(SparseCode(c.values, c.indices[:, :1]), w), "must have one shape"),
        (lambda c, w: ops.sparse_decode(SparseCode(c.values, c.values), w), "indices must be integers"),
        (lambda c, w: ops.sparse_decode(c, w[0]), "w_dec must have 2 dimensions"),
        (lambda c, w: ops.sparse_decode(c, w, mx.zeros(3)), "b_dec must have shape [d_out] = [6]"),
        (lambda c, w: ops.gather_dot(mx.zeros((5, 7)), w, c.indices), "must share d"),
        (lambda c, w: ops.gather_dot(mx.zeros((4, 6)), w, c.indices), "must share n"),
        (lambda c, w: ops.sparse_outer(c, mx.zeros((4, 6)), d_sae=20), "must share n"),
        (lambda c, w: ops.sparse_outer(c, mx.zeros((5, 6)), d_sae=0), "d_sae must be positive"),
        (lambda c, w: ops.decode_residual(c, w, mx.zeros((5, 7))), "target must have shape [n, d_out]"),
        (lambda c, w: ops.update_tokens_since_fired(mx.zeros(20), c), "must be int32"),
        (
            lambda c, w: ops.update_tokens_since_fired(mx.zeros(20, mx.int32), c, n_tokens=-1),
            "n_tokens must be at least 0",
        ),
        (lambda c, w: fired(DenseCode(mx.zeros((5, 20))), mx.zeros(20)), "must be int32"),
        (
            lambda c, w: fired(DenseCode(mx.zeros((5, 1)))),
            "values must have shape [n, d_sae] = [n, 20] but got (5, 1)",
        ),
        (lambda c, w: fired(DenseCode(mx.zeros((2, 5, 20)))), "values must have shape [n, d_sae]"),
        (lambda c, w: fired(DenseCode(mx.zeros((5, 20))), n_tokens=-1), "n_tokens must be at least 0"),
    ],
)
def test_malformed(call, message):
    code = SparseCode(mx.ones((5, 2)), mx.zeros((5, 2), mx.uint32))
    with pytest.raises(ValueError) as e:
        call(code, mx.zeros((20, 6)))
    assert message in str(e.value)


def test_backends_tell_what_runs():
    table = ops.backends()
    assert set(table) == {
        "adam_catch_up",
        "topk_encode",
        "batch_topk_encode",
        "threshold_encode",
        "sparse_decode",
        "gather_dot",
        "sparse_outer",
        "decode_residual",
        "encoder_shadow",
        "feature_update",
        "tokens_since_fired",
    }
    assert all(row["cpu"].startswith("kernel (") for row in table.values())
    with ops.plain():
        assert all(row["cpu"] == "fallback" for row in ops.backends().values())
    assert ops.backends() == table


def test_every_op_tells_what_it_takes_gives_and_refuses():
    for name in ("encoder_shadow", "topk_encode", "topk_encode_masked", "batch_topk_encode", "threshold_encode",
                 "threshold_encode_capped", "sparse_decode", "gather_dot", "sparse_outer", "decode_residual",
                 "update_tokens_since_fired", "feature_update"):  # fmt: skip
        text = getattr(ops, name).__doc__
        assert "Args:" in text, name
        assert "Raises:" in text, name
        assert "Returns:" in text or "The shadow" in text, name
