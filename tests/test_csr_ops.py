"""The ops on codes in compressed rows, against the oracle, the fallback, finite differences and codes with slots."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from mlxsae import SparseCode, SparseCodeCSR, ops, to_dense
from mlxsae.ops import Params, Term
from tools import DTYPES, array, finite_difference, graph_of, numpy

SHAPES = [  # n, d, d_sae, mean entries of a row
    (1, 1, 1, 1),
    (2, 31, 33, 1),
    (31, 33, 48, 40),
    (33, 1000, 31, 7),
    (64, 48, 1000, 32),
    (5, 32, 2, 2),
]


def random_code(rng, n, d_sae, k, dtype=mx.float32, tail=0):
    """Rows of any length, empty ones too; some entries 0, some negative; then `tail` entries of no row, full of rubbish."""
    lengths = rng.integers(0, min(2 * k, d_sae) + 1, n)
    indices = [np.sort(rng.permutation(d_sae)[:m]) for m in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = np.concatenate([*indices, np.full(tail, 2**32 - 1)]).astype(np.uint32)
    values = rng.standard_normal(len(indices)) * (rng.random(len(indices)) > 0.3)
    values[offsets[-1] :] = np.nan
    return SparseCodeCSR(array(values, dtype), mx.array(indices), mx.array(offsets))


def slots(code):
    """The oracle's arguments: (values, indices), each row padded with entries of value 0."""
    return oracle.csr_to_slots(numpy(code.values), np.array(code.indices), np.array(code.offsets))


def problem(rng, n, d, d_sae, k, dtype=mx.float32, tail=0):
    code = random_code(rng, n, d_sae, k, dtype, tail)
    return code, array(rng.standard_normal((d_sae, d)), dtype), array(rng.standard_normal((n, d)), dtype)


def close(got, want, dtype):
    tol = oracle.RTOL[str(dtype).split(".")[-1]]
    assert got.dtype == dtype
    assert got.shape == want.shape
    np.testing.assert_allclose(numpy(got), want, rtol=tol, atol=tol * 0.1 * np.abs(want).max(initial=1e-30))


def gather_dot_oracle(r, w, code):
    offsets = np.array(code.offsets)
    out = np.zeros(code.values.shape[0])
    for t in range(len(offsets) - 1):
        here = slice(offsets[t], offsets[t + 1])
        out[here] = w[np.array(code.indices)[here]] @ r[t]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize(("n", "d", "d_sae", "k"), SHAPES)
def test_equal_the_oracle(n, d, d_sae, k, tail, dtype):
    rng = np.random.default_rng(n + d_sae)
    code, w, rows = problem(rng, n, d, d_sae, k, dtype, tail)
    bias = array(rng.standard_normal(d), dtype)
    (v, i), w64, r64 = slots(code), numpy(w), numpy(rows)
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        close(run(ops.sparse_decode, code, w, bias), oracle.sparse_decode(v, i, w64, numpy(bias)), dtype)
        close(run(ops.sparse_decode, code, w), oracle.sparse_decode(v, i, w64), dtype)
        close(run(ops.gather_dot, rows, w, code), gather_dot_oracle(r64, w64, code), dtype)
        close(run(ops.sparse_outer, code, rows, d_sae=d_sae), oracle.sparse_outer(v, i, r64, d_sae), dtype)
        residual, square = run(ops.decode_residual, code, w, rows, bias)
        if dtype == mx.float32:
            want = oracle.sparse_decode(v, i, w64, numpy(bias)) - r64
            close(residual, want, dtype)
            close(square, (want**2).sum(1), dtype)
    np.testing.assert_allclose(numpy(to_dense(code, d_sae)), oracle.to_dense(v, i, d_sae))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.sampled_from([1, 15, 17, 64]), st.integers(1, 300), st.integers(0, 4), st.data()
)
def test_any_shape_equals_slots(n, d, d_sae, tail, data):
    """A code has the same results, bit for bit, in rows and in slots; the fallback agrees."""
    k = data.draw(st.integers(1, min(d_sae, 40)))
    code, w, rows = problem(np.random.default_rng(d_sae + n), n, d, d_sae, k, tail=tail)
    v, i = slots(code)
    same = SparseCode(mx.array(v, mx.float32), mx.array(i.astype(np.uint32)))
    results = [
        (ops.sparse_decode, (w,), {}),
        (ops.sparse_outer, (rows,), {"d_sae": d_sae}),
        (ops.decode_residual, (w, rows), {}),
        (lambda c, t: ops.update_tokens_since_fired(t, c), (mx.arange(d_sae),), {}),
    ]
    for op, args, options in results:
        got, want, graph = (
            op(code, *args, **options),
            op(same, *args, **options),
            graph_of(op, code, *args, **options),
        )
        for g, w_, f in zip(
            *((a if isinstance(a, tuple) else (a,)) for a in (got, want, graph)), strict=True
        ):
            assert g.shape == w_.shape == f.shape
            np.testing.assert_array_equal(np.array(g), np.array(w_))
            np.testing.assert_allclose(np.array(f), np.array(g), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_since_fired(dtype):
    rng = np.random.default_rng(0)
    code = random_code(rng, 33, 100, 3, dtype, tail=4)
    counts = rng.integers(0, 1000, 100)
    v, i = slots(code)
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        got = run(ops.update_tokens_since_fired, mx.array(counts, mx.int32), code)
        np.testing.assert_array_equal(np.array(got), oracle.tokens_since_fired(counts, v, i, 33))


def test_derivatives_of_every_argument():
    rng = np.random.default_rng(0)
    n, d, d_sae = 4, 3, 9
    code, w, rows = problem(rng, n, d, d_sae, 3)
    v = numpy(code.values)
    v[v == 0] = 0.7  # at 0 an entry is unused, not differentiable
    rest = code._replace(values=mx.array(v, mx.float32))
    w64, r64, bias = numpy(w), numpy(rows), rng.standard_normal(d)
    i, o = np.array(code.indices), np.array(code.offsets)
    c1, c2, c3 = rng.standard_normal((n, d)), rng.standard_normal(len(v)), rng.standard_normal((d_sae, d))

    def of(v):
        return rest._replace(values=v)

    def slot(v):
        return oracle.csr_to_slots(v, i, o)

    cases = [
        (lambda v, w, b: ops.sparse_decode(of(v), w, b), lambda v, w, b: oracle.sparse_decode(*slot(v), w, b), [v, w64, bias], c1),
        (lambda r, w: ops.gather_dot(r, w, rest), lambda r, w: gather_dot_oracle(r, w, rest), [r64, w64], c2),
        (lambda v, r: ops.sparse_outer(of(v), r, d_sae=d_sae), lambda v, r: oracle.sparse_outer(*slot(v), r, d_sae), [v, r64], c3),
        (lambda v, w, y: ops.decode_residual(of(v), w, y)[0], lambda v, w, y: oracle.sparse_decode(*slot(v), w) - y, [v, w64, r64], c1),
        (lambda v: to_dense(of(v), d_sae) @ w, lambda v: oracle.sparse_decode(*slot(v), w64), [v], c1),
    ]  # fmt: skip
    for f, f64, args, c in cases:
        primals = [mx.array(a, mx.float32) for a in args]
        cot = mx.array(c, mx.float32)
        tangents = [mx.array(rng.standard_normal(a.shape), mx.float32) for a in args]
        for run in (lambda g: g(), graph_of):
            loss = lambda *p, f=f, cot=cot: mx.sum(f(*p) * cot)  # noqa: E731
            gradient = mx.grad(loss, argnums=list(range(len(primals))))
            grads = run(lambda g=gradient, p=primals: g(*p))
            grads = grads if isinstance(grads, tuple) else (grads,)
            if run is not graph_of and len(args) > 1:  # MLX's scatter has no forward derivative
                (_,), (dot,) = mx.jvp(lambda *a, f=f: f(*a), primals, tangents)
                forward = sum(mx.sum(g * t).item() for g, t in zip(grads, tangents, strict=True))
                np.testing.assert_allclose(forward, mx.sum(dot * cot).item(), rtol=1e-4, atol=1e-4)
            for q, g in enumerate(grads):
                want = finite_difference(lambda *a, f64=f64, c=c: (f64(*a) * c).sum(), args, q)
                np.testing.assert_allclose(np.array(g), want, rtol=1e-4, atol=1e-4)


def test_second_derivative():
    """The ops are closed under differentiation: d/dw of the gradient of |decode|^2 in the values."""
    rng = np.random.default_rng(1)
    code, w, _ = problem(rng, 4, 3, 9, 3)
    v = numpy(code.values)
    c = rng.standard_normal(len(v))
    i, o = np.array(code.indices), np.array(code.offsets)

    def first(w, v):
        g = mx.grad(lambda v: mx.sum(ops.sparse_decode(code._replace(values=v), w) ** 2))(v)
        return mx.sum(g * mx.array(c, mx.float32))

    def first64(w):
        g = 2 * oracle.sparse_decode(*oracle.csr_to_slots(v, i, o), w)
        return (gather_dot_oracle(g, w, code) * c).sum()

    got = mx.grad(first)(w, mx.array(v, mx.float32))
    np.testing.assert_allclose(np.array(got), finite_difference(first64, [numpy(w)], 0), rtol=2e-4, atol=2e-4)


def test_vmap():
    rng = np.random.default_rng(0)
    code, w, rows = problem(rng, 5, 7, 11, 3)
    ws, rs = mx.stack([w, 2 * w, -w]), mx.stack([rows, 3 * rows, -rows])
    values = mx.stack([code.values, -code.values, 2 * code.values])
    cases = [
        (lambda w: ops.sparse_decode(code, w), (ws,)),
        (lambda v, w: ops.sparse_decode(code._replace(values=v), w), (values, ws)),
        (lambda r: ops.gather_dot(r, w, code), (rs,)),
        (lambda v, r: ops.sparse_outer(code._replace(values=v), r, d_sae=11), (values, rs)),
    ]
    for f, args in cases:
        out = mx.vmap(f)(*args)
        for q in range(3):
            np.testing.assert_array_equal(np.array(out[q]), np.array(f(*(a[q] for a in args))))


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("both", [False, True])
def test_feature_update_equals_slots(both, clip_norm):
    """One term or two, in rows or in slots: the same bits; and the fallback agrees."""
    rng = np.random.default_rng(3)
    n, d, d_sae = 20, 17, 40

    def draw(*shape):
        return mx.array(rng.standard_normal(shape), mx.float32)

    codes = [random_code(rng, n, d_sae, 4, tail=3), random_code(rng, n, d_sae, 2)]
    same = [SparseCode(mx.array(v, mx.float32), mx.array(i.astype(np.uint32))) for v, i in map(slots, codes)]
    residuals, scales = [draw(n, d), draw(n, d)], [mx.array(0.1), mx.array(0.02)]
    x, params = draw(n, d), Params(draw(d_sae, d), draw(d_sae), draw(d_sae, d), draw(d))
    m, v = Params(*(0.1 * a for a in params)), Params(*(mx.abs(a) for a in params))

    def update(codes):
        terms = [Term(r, c, s) for r, c, s in zip(residuals, codes, scales, strict=True)][: 1 + both]
        out = ops.feature_update(
            x,
            terms,
            params,
            m,
            v,
            loss=mx.array(1.0),
            lr=1e-2,
            step=3,
            b_dec_to_input=True,
            clip_norm=clip_norm,
        )
        return [*out.params, *out.m, *out.v, out.grad_norm]

    want = update(same)
    mixed = [codes[0], same[1]]
    for got in (update(codes), update(mixed)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))
    for a, b in zip(graph_of(update, codes), want, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5)


def test_a_code_keeps_its_type_through_transforms():
    code, w, _ = problem(np.random.default_rng(0), 5, 7, 11, 3)
    out = mx.compile(lambda c: c._replace(values=c.values * 2))(code)
    assert isinstance(out, SparseCodeCSR)
    got = mx.compile(lambda c, w: ops.sparse_decode(c, w))(code, w)
    np.testing.assert_array_equal(np.array(got), np.array(ops.sparse_decode(code, w)))


def test_rows():
    code = SparseCodeCSR(mx.zeros(5), mx.zeros(5, mx.uint32), mx.array([0, 2, 2, 3]))
    assert code.rows().tolist() == [0, 0, 2, 3, 3]
    assert SparseCodeCSR(mx.zeros(2), mx.zeros(2, mx.uint32), mx.array([0])).rows().tolist() == [0, 0]


@pytest.mark.parametrize("offsets", [[1, 2, 3], [0, 3, 2], [0, 2, 5], [0, -1, 3]])
def test_wrong_offsets_are_an_error_when_evaluated(offsets):
    code = SparseCodeCSR(mx.ones(4), mx.zeros(4, mx.uint32), mx.array(offsets))
    w, rows = mx.zeros((20, 4)), mx.zeros((2, 4))
    for call in (
        lambda c: ops.sparse_decode(c, w),
        lambda c: ops.gather_dot(rows, w, c),
        lambda c: ops.sparse_outer(c, rows, d_sae=20),
        lambda c: ops.decode_residual(c, w, rows)[0],
        lambda c: ops.update_tokens_since_fired(mx.zeros(20, mx.int32), c),
    ):
        with pytest.raises(Exception, match=r"offsets must ascend from 0 to at most nnz=4"):
            mx.eval(call(code))
    mx.eval(ops.sparse_decode(code._replace(offsets=mx.array([0, 1, 4])), w))  # the stream works on


def test_an_index_out_of_range_is_an_error_when_evaluated():
    code = SparseCodeCSR(mx.ones(3), mx.array([1, 50, 99], dtype=mx.uint32), mx.array([0, 1, 2]))
    with pytest.raises(Exception, match=r"indices must be below d_sae=20 but got 50"):
        mx.eval(ops.sparse_decode(code, mx.zeros((20, 4))))
    mx.eval(ops.sparse_decode(code, mx.zeros((51, 4))))  # the last entry is in no row


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, w: ops.sparse_decode(c._replace(values=c.values[:2]), w), "must have one shape"),
        (lambda c, w: ops.sparse_decode(c._replace(offsets=mx.zeros(3)), w), "offsets must be integers of shape [n + 1]"),
        (lambda c, w: ops.sparse_decode(c._replace(offsets=mx.zeros(0, mx.int64)), w), "offsets must be integers"),
        (lambda c, w: ops.sparse_decode(c._replace(offsets=mx.zeros((3, 1), mx.int64)), w), "offsets must be integers"),
        (
            lambda c, w: ops.sparse_decode(SparseCodeCSR(mx.ones((2, 2)), mx.zeros((2, 2), mx.uint32), c.offsets), w),
            "indices must have shape [nnz]",
        ),
        (lambda c, w: ops.gather_dot(mx.zeros((3, 6)), w, c), "must share n"),
        (lambda c, w: ops.sparse_outer(c, mx.zeros((3, 6)), d_sae=20), "must share n"),
        (lambda c, w: ops.decode_residual(c, w, mx.zeros((3, 6))), "target must have shape [n, d_out] = [2, 6]"),
        (lambda c, w: to_dense(c._replace(values=c.values[:2]), 20), "must have one shape [nnz]"),
    ],
)  # fmt: skip
def test_malformed(call, message):
    code = SparseCodeCSR(mx.ones(4), mx.zeros(4, mx.uint32), mx.array([0, 1, 4]))
    with pytest.raises(ValueError) as e:
        call(code, mx.zeros((20, 6)))
    assert message in str(e.value)
