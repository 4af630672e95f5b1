"""topk_encode against the float64 oracle, its fallback, and what it promises about ties, NaN, memory and derivatives."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from mlxsae import SparseCode, ops
from tools import DTYPES, array, finite_difference, graph_of, numpy

SHAPES = [  # n, d_in, d_sae, k: odd tails everywhere
    (1, 1, 1, 1),
    (1, 31, 33, 1),
    (2, 48, 1000, 33),
    (31, 33, 48, 48),
    (33, 1000, 31, 7),
    (64, 64, 4096, 32),
    (100, 48, 5001, 31),
    (130, 17, 9000, 5),
    (257, 32, 700, 1),
]


def problem(rng, n, d_in, d_sae, dtype):
    x = array(rng.standard_normal((n, d_in)), dtype)
    w = array(rng.standard_normal((d_sae, d_in)) / np.sqrt(d_in), dtype)
    return x, w, array(0.1 * rng.standard_normal(d_sae), dtype)


def check(x, w, b, k, code):
    xs, ws, bs = numpy(x), numpy(w), None if b is None else numpy(b)
    values, indices = numpy(code.values), np.array(code.indices)
    _, _, z = oracle.topk_encode(xs, ws, bs, k)
    assert code.values.shape == code.indices.shape == (x.shape[0], k)
    assert code.indices.dtype == mx.uint32
    assert (np.diff(indices.astype(np.int64), axis=1) > 0).all(), "indices ascend"
    assert oracle.same_selection(z, oracle.float32_error_bound(xs, ws, bs), indices, k) == []
    want = np.maximum(np.take_along_axis(z, indices.astype(np.int64), 1), 0)
    name = str(code.values.dtype).split(".")[-1]
    np.testing.assert_allclose(values, want, rtol=oracle.RTOL[name], atol=2e-6 * np.abs(z).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SHAPES)
def test_equals_the_oracle(n, d_in, d_sae, k, dtype):
    x, w, b = problem(np.random.default_rng(n * d_sae), n, d_in, d_sae, dtype)
    code = ops.topk_encode(x, w, b, k=k)
    assert code.values.dtype == dtype
    check(x, w, b, k, code)
    check(x, w, None, k, ops.topk_encode(x, w, k=k))


@pytest.mark.parametrize(
    "types", [(mx.float32, mx.bfloat16), (mx.float16, mx.float32), (mx.bfloat16, mx.float16)]
)
def test_mixed_types(types):
    rng = np.random.default_rng(0)
    x, w, b = (
        array(a, t)
        for a, t in zip(
            (rng.standard_normal((9, 24)), rng.standard_normal((200, 24)), rng.standard_normal(200)),
            (*types, mx.float32),
            strict=True,
        )
    )
    code = ops.topk_encode(x, w, b, k=6)
    assert code.values.dtype == mx.float32
    check(x, w, b, 6, code)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 90), st.sampled_from([1, 3, 31, 32, 33, 48]), st.integers(1, 6000), st.data())
def test_any_shape(n, d_in, d_sae, data):
    k = data.draw(st.integers(1, min(d_sae, 70)))
    x, w, b = problem(np.random.default_rng(d_sae), n, d_in, d_sae, mx.float32)
    code = ops.topk_encode(x, w, b, k=k)
    if n == 0:
        assert code.values.shape == (0, k)
    else:
        check(x, w, b, k, code)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from([40, 700, 5000]), st.integers(1, 40), st.integers(0, 3))
def test_ties_go_to_the_lowest_index(n, d_sae, k, spread):
    """Small integers: every product is exact and full of ties, so the oracle's choice is the only right one."""
    rng = np.random.default_rng(n * d_sae + k)
    x = rng.integers(-spread, spread + 1, (n, 8)).astype(np.float32)
    w = rng.integers(-spread, spread + 1, (d_sae, 8)).astype(np.float32)
    code = ops.topk_encode(mx.array(x), mx.array(w), k=k)
    values, indices, _ = oracle.topk_encode(x, w, None, k)
    np.testing.assert_array_equal(np.array(code.indices), indices)
    np.testing.assert_array_equal(np.array(code.values), values)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "negative"])
def test_adversarial_orders(order):
    """Sorted weights overflow every candidate list or defeat its first guess; nothing may be lost."""
    d_sae, k = 9000, 37
    score = {
        "ascending": np.arange(d_sae),
        "descending": -np.arange(d_sae),
        "equal": np.ones(d_sae),
        "negative": -1.0 - np.arange(d_sae) % 7,
    }[order]
    w = np.zeros((d_sae, 4), np.float32)
    w[:, 0] = score
    x = np.zeros((70, 4), np.float32)
    x[:, 0] = 1 + np.arange(70)
    code = ops.topk_encode(mx.array(x), mx.array(w), k=k)
    values, indices, _ = oracle.topk_encode(x, w, None, k)
    np.testing.assert_array_equal(np.array(code.indices), indices)
    np.testing.assert_array_equal(np.array(code.values), values)


def test_nan_and_infinity_are_selected_first_and_survive():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5000, 8)).astype(np.float32)
    x = rng.standard_normal((20, 8)).astype(np.float32)
    w[4321, 3] = np.nan
    w[17, 2] = np.inf
    x[:, 2] = 1
    code = ops.topk_encode(mx.array(x), mx.array(w), k=3)
    values, indices = np.array(code.values), np.array(code.indices)
    for t in range(20):
        row = dict(zip(indices[t].tolist(), values[t].tolist(), strict=True))
        assert np.isnan(row[4321])
        assert row[17] == np.inf
    x[5, 0] = np.nan  # a whole row of NaN: the lowest features, all NaN
    code = ops.topk_encode(mx.array(x), mx.array(w), k=3)
    assert np.isnan(np.array(code.values)[5]).all()
    assert np.array(code.indices)[5].tolist() == [0, 1, 2]
    assert not np.isnan(np.array(code.values)[6][np.array(code.indices)[6] != 4321]).any()


def test_minus_infinity_fills_up_with_the_lowest_features():
    w = np.zeros((40, 2), np.float32)
    b = np.full(40, -np.inf, np.float32)
    b[[7, 20]] = [2.0, 1.0]
    code = ops.topk_encode(mx.zeros((3, 2)), mx.array(w), mx.array(b), k=4)
    assert np.array(code.indices).tolist() == [[0, 1, 7, 20]] * 3
    assert np.array(code.values).tolist() == [[0, 0, 2, 1]] * 3


def test_subnormal_and_large_values():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4500, 16)).astype(np.float32)
    for scale in (1e-39, 1e30):
        x = (rng.standard_normal((20, 16)) * scale).astype(np.float32)
        _, _, z = oracle.topk_encode(x, w, None, 5)
        code = ops.topk_encode(mx.array(x), mx.array(w), k=5)
        bound = oracle.float32_error_bound(x, w, None) + 16 * 1.5e-45 * 2
        assert oracle.same_selection(z, bound, np.array(code.indices), 5) == []
    near = array(
        np.full((2, 16), 60000.0), mx.float16
    )  # pre-activations pass float16's largest, selection does not
    code = ops.topk_encode(near, array(np.abs(w), mx.float16), k=5)
    assert np.isinf(numpy(code.values)).all()
    check32 = ops.topk_encode(near.astype(mx.float32), array(np.abs(w), mx.float16), k=5)
    np.testing.assert_array_equal(np.array(code.indices), np.array(check32.indices))


def test_strided_inputs_equal_contiguous_ones():
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((40, 30)).astype(np.float32))
    w = mx.array(rng.standard_normal((300, 30)).astype(np.float32))
    want = ops.topk_encode(mx.contiguous(x[::2, ::-1]), mx.contiguous(w[::-1, ::-1]), k=4)
    got = ops.topk_encode(x[::2, ::-1], w[::-1, ::-1], k=4)
    np.testing.assert_array_equal(np.array(got.indices), np.array(want.indices))
    np.testing.assert_array_equal(np.array(got.values), np.array(want.values))


def test_a_transposed_view_costs_no_copy():
    w = mx.random.normal((40000, 64))
    view = w.T  # what an SAE shows as W_enc [d_in, d_sae]
    x = mx.random.normal((2, 64))
    mx.eval(w, view, x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(ops.topk_encode(x, view.T, k=4))
    assert mx.get_peak_memory() - before < w.nbytes / 10


def test_pre_activations_are_never_stored():
    """[n, d_sae] would be 256 MB here; the op may allocate a hundredth of that, kernel and fallback alike."""
    n, d_sae = 1024, 65536
    x, w = mx.random.normal((n, 16)), mx.random.normal((d_sae, 16))
    mx.eval(x, w)
    for run, share in (
        (lambda: ops.topk_encode(x, w, k=8), 0.01),
        (lambda: graph_of(ops.topk_encode, x, w, k=8), 0.6),
    ):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(run())
        assert mx.get_peak_memory() - before < share * n * d_sae * 4


RESIDENT = """
import resource, mlx.core as mx
from mlxsae import ops
x, w = mx.random.normal((2048, 64)), mx.random.normal((131072, 64))
mx.eval(x, w, ops.topk_encode(x[:64], w, k=8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mx.eval(ops.topk_encode(x, w, k=8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_resident_memory_does_not_hold_the_pre_activations():
    """The process as a whole, outside MLX's allocator too: [n, d_sae] would be 1 GiB."""
    out = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert int(out.stdout) * 1024 < 48 << 20


def test_fallback_equals_kernel():
    rng = np.random.default_rng(3)
    for n, d_in, d_sae, k in [(5, 8, 30, 3), (40, 24, 3000, 17), (3, 8, 64, 64)]:
        x, w, b = problem(rng, n, d_in, d_sae, mx.float32)
        want, got = ops.topk_encode(x, w, b, k=k), graph_of(ops.topk_encode, x, w, b, k=k)
        np.testing.assert_array_equal(np.array(got.indices), np.array(want.indices))
        np.testing.assert_allclose(np.array(got.values), np.array(want.values), rtol=1e-5, atol=1e-6)
    x = mx.array(rng.integers(-2, 3, (30, 6)).astype(np.float32))
    w = mx.array(rng.integers(-2, 3, (2500, 6)).astype(np.float32))
    want, got = ops.topk_encode(x, w, k=9), graph_of(ops.topk_encode, x, w, k=9)
    np.testing.assert_array_equal(np.array(got.indices), np.array(want.indices))


def test_gradients_against_finite_differences():
    rng = np.random.default_rng(1)
    x, w, b = rng.standard_normal((6, 5)), rng.standard_normal((20, 5)), rng.standard_normal(20) * 0.1
    r = rng.standard_normal((6, 20))

    def loss64(x, w, b):
        values, indices, _ = oracle.topk_encode(x, w, b, 4)
        return (values * np.take_along_axis(r, indices, 1)).sum()

    def loss(x, w, b):
        code = ops.topk_encode(x, w, b, k=4)
        return mx.sum(code.values * mx.take_along_axis(mx.array(r, mx.float32), code.indices, 1))

    args = [mx.array(a, mx.float32) for a in (x, w, b)]
    grads = mx.grad(loss, argnums=[0, 1, 2])(*args)
    for i, g in enumerate(grads):
        want = finite_difference(loss64, [x, w, b], i)
        np.testing.assert_allclose(np.array(g), want, rtol=1e-4, atol=1e-5)
    # jvp: the directional derivative is the gradient's product with the direction
    tangents = [mx.array(rng.standard_normal(a.shape), mx.float32) for a in (x, w, b)]
    _, (dot,) = mx.jvp(loss, args, tangents)
    want = sum(mx.sum(g * t) for g, t in zip(grads, tangents, strict=True))
    np.testing.assert_allclose(dot.item(), want.item(), rtol=1e-4)


def test_second_derivative():
    """The gradient penalty |dL/dx|^2 goes through gather_dot's and sparse_decode's own derivatives."""
    rng = np.random.default_rng(1)
    x, w = (mx.array(rng.standard_normal(s), mx.float32) for s in ((5, 4), (12, 4)))

    def penalty(encode, w):
        inner = mx.grad(lambda x: mx.sum(mx.square(encode(x, w))))(x)
        return mx.sum(mx.square(inner))

    got = mx.grad(lambda w: penalty(lambda x, w: ops.topk_encode(x, w, k=3).values, w))(w)
    want = mx.grad(lambda w: penalty(lambda x, w: graph_of(ops.topk_encode, x, w, k=3).values, w))(w)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-4)


def test_compile_vmap_and_equivalence():
    x, w = mx.random.normal((3, 10, 8)), mx.random.normal((50, 8))
    f = mx.compile(lambda x, w: ops.topk_encode(x, w, k=3))
    code, want = f(x[0], w), ops.topk_encode(x[0], w, k=3)
    assert isinstance(code, SparseCode)
    assert mx.array_equal(code.indices, want.indices)
    g = mx.compile(lambda x, w: ops.topk_encode(x, w, k=3).values.sum(), shapeless=True)
    for n in (4, 7):
        np.testing.assert_allclose(
            g(x[0][:n], w).item(), ops.topk_encode(x[0][:n], w, k=3).values.sum().item(), rtol=1e-6
        )
    both = mx.vmap(lambda x: ops.topk_encode(x, w, k=3))(x)
    rows = [ops.topk_encode(x[i], w, k=3) for i in range(3)]
    assert mx.array_equal(both.indices, mx.stack([r.indices for r in rows]))
    weights = mx.random.normal((2, 50, 8))  # batched weights: through the definition
    both = mx.vmap(lambda w: ops.topk_encode(x[0], w, k=3))(weights)
    for i in range(2):
        assert mx.array_equal(both.indices[i], ops.topk_encode(x[0], weights[i], k=3).indices)
    grad = mx.compile(mx.grad(lambda w: ops.topk_encode(x[0], w, k=3).values.sum()))(w)
    assert grad.shape == w.shape


def test_vmap_over_encoders_of_one_token():
    """Their definition orders one row by constants that are not batched."""
    x, weights = mx.random.normal((1, 8)), mx.random.normal((4, 3000, 8))
    codes = mx.vmap(lambda w: ops.topk_encode(x, w, k=5))(weights)
    with ops.plain():
        batch = mx.vmap(lambda w: tuple(ops.batch_topk_encode(x, w, k=5)[0]))(weights)
    for i in range(4):
        want = ops.topk_encode(x, weights[i], k=5)
        assert mx.array_equal(codes.indices[i], want.indices)
        assert mx.array_equal(batch[1][i], want.indices[0])
        np.testing.assert_allclose(np.array(codes.values[i]), np.array(want.values), rtol=1e-5)


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avx2", "neon", "plain"])
def test_every_instruction_set_and_thread_count_selects_the_same(isa):
    program = """
import sys, numpy as np, mlx.core as mx
from mlxsae import ops
ops.backends()  # says at once if this machine does not run the set
rng = np.random.default_rng(0)
for n, d, f, k in [(1, 64, 5000, 9), (70, 100, 6000, 20), (200, 33, 513, 513), (200, 512, 4100, 32)]:
    x, w = (mx.array(rng.standard_normal(s).astype(np.float32)) for s in ((n, d), (f, d)))
    code = ops.topk_encode(x, w, k=k)
    sys.stdout.write(str(int(np.array(code.indices).astype(np.int64).dot(np.arange(k)).dot(np.arange(n) + 1))) + " ")
    sys.stdout.write(np.array(code.values).sum(dtype=np.float64).hex() + " ")
"""

    def run(**env):
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **env}
        )

    out = run(MLXSAE_CPU_ISA=isa, MLXSAE_NUM_THREADS="1")
    if out.returncode and "must be one of" in out.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert out.returncode == 0, out.stderr
    best = run(MLXSAE_NUM_THREADS="3").stdout.split()
    got = out.stdout.split()
    assert got[::2] == best[::2]
    if isa != "plain":  # plain has no fused multiply-add: the last bits differ
        assert got == best


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "2x", "99999999999"])
def test_a_wrong_number_of_threads_is_refused(wrong):
    program = "import mlxsae, mlx.core as mx; print(mlxsae.ops.num_threads())"
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "MLXSAE_NUM_THREADS": wrong},
    )
    assert out.returncode
    assert not out.stdout
    assert f"MLXSAE_NUM_THREADS must be a whole number of at least 1 but got {wrong}." in out.stderr


@pytest.mark.parametrize(
    ("args", "k", "message"),
    [
        (((4, 8), (16, 8), (16,)), 0, "k must be in (0, d_sae] but got k=0 with d_sae=16"),
        (((4, 8), (16, 8), (16,)), -3, "k must be in (0, d_sae]"),
        (((4, 8), (16, 8), (16,)), 17, "k must be in (0, d_sae] but got k=17 with d_sae=16"),
        (((4, 7), (16, 8), (16,)), 2, "must share d_in"),
        (((4, 8), (16, 8), (15,)), 2, r"b_enc must have shape [d_sae] = [16] but got (15)"),
        (((8,), (16, 8), (16,)), 2, "x must have 2 dimensions"),
        (((4, 8), (16,), (16,)), 2, "w_enc must have 2 dimensions"),
    ],
)
def test_malformed(args, k, message):
    with pytest.raises(ValueError, match="topk_encode") as e:
        ops.topk_encode(*(mx.zeros(s) for s in args), k=k)
    assert message in str(e.value)


@pytest.mark.parametrize("dtype", [mx.int32, mx.float64, mx.complex64, mx.bool_])
def test_wrong_types(dtype):
    x = mx.zeros((4, 8), dtype=dtype, stream=mx.cpu)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16 but got"):
        ops.topk_encode(x, mx.zeros((16, 8)), k=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_in"), [(3, 2049), (70, 2081), (130, 4100)])
def test_wide_inputs(n, d_in, dtype):
    """Inputs past the depth of the cache carry their sums between passes: one chain of additions all the same."""
    x, w, b = problem(np.random.default_rng(d_in), n, d_in, 501, dtype)
    check(x, w, b, 9, ops.topk_encode(x, w, b, k=9))


@pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="a GPU has no memory that costs nothing unless touched"
)
def test_weights_of_over_two_to_the_31_numbers():
    """Places in a large encoder or decoder are 64-bit. Of its 4 GiB only the last row is written, and no page of the
    rest becomes memory of its own; it reads as zeros."""
    d_in, last = 4096, 2**19
    w = ops.unwritten((last + 1, d_in), mx.float16)
    assert w.size > 2**31
    np.array(w, copy=False)[last] = 1
    x, code = (
        mx.ones((1, d_in), mx.float16),
        SparseCode(mx.full((1, 2), 0.5), mx.array([[0, last]], mx.uint32)),
    )
    assert ops.gather_dot(x, w, code.indices).tolist() == [[0, d_in]]
    assert mx.array_equal(ops.sparse_decode(code, w), 0.5 * x)
    assert ops.decode_residual(code, w, x)[1].tolist() == [d_in / 4]
    found = ops.topk_encode(x, w, k=2)
    assert found.indices.tolist() == [[0, last]]
    assert found.values.tolist() == [[0, d_in]]


@pytest.mark.parametrize(
    ("n", "d_sae", "k", "k_aux", "share"),
    [
        (1, 50, 3, 50, 0.5),
        (70, 5000, 9, 40, 0.02),
        (33, 900, 900, 16, 0.3),
        (5, 40, 2, 7, 0.0),
        (130, 6000, 20, 100, 1.0),
    ],
)
def test_masked_selection(n, d_sae, k, k_aux, share):
    rng = np.random.default_rng(d_sae)
    x, w, b = problem(rng, n, 24, d_sae, mx.float32)
    mask = rng.random(d_sae) < share
    first, second = ops.topk_encode_masked(x, w, b, mask=mx.array(mask), k=k, k_aux=k_aux)
    want = ops.topk_encode(x, w, b, k=k)
    assert mx.array_equal(first.values, want.values)
    assert mx.array_equal(first.indices, want.indices)
    _, _, z = oracle.topk_encode(numpy(x), numpy(w), numpy(b), k)
    values, indices = np.array(second.values), np.array(second.indices).astype(np.int64)
    kept = min(k_aux, int(mask.sum()))
    bound = oracle.float32_error_bound(numpy(x), numpy(w), numpy(b))
    for t in range(n):
        assert (np.diff(indices[t]) > 0).all()
        of_masked = mask[indices[t]]
        assert of_masked.sum() >= kept
        np.testing.assert_allclose(
            values[t][of_masked], np.maximum(z[t][indices[t][of_masked]], 0), rtol=1e-4, atol=1e-5
        )
        assert (values[t][~of_masked] == 0).all(), "slots past the masked features are unused"
        left = np.setdiff1d(np.nonzero(mask)[0], indices[t])
        if kept and len(left):
            chosen = indices[t][of_masked]
            assert (z[t][left] - bound[t][left]).max() <= (z[t][chosen] + bound[t][chosen]).min()
    fallback = graph_of(ops.topk_encode_masked, x, w, b, mask=mx.array(mask), k=k, k_aux=k_aux)
    np.testing.assert_allclose(np.array(fallback[1].values).sum(1), values.sum(1), rtol=1e-4, atol=1e-4)


def test_masked_gradient_is_the_sum_of_both_selections():
    rng = np.random.default_rng(0)
    x, w, b = problem(rng, 6, 5, 30, mx.float32)
    mask = mx.array(rng.random(30) < 0.4)

    def loss(w):
        first, second = ops.topk_encode_masked(x, w, b, mask=mask, k=3, k_aux=4)
        return mx.sum(mx.square(first.values)) + 3 * mx.sum(mx.square(second.values))

    def definition(w):
        z = x @ w.T + b
        first = mx.sort(z, axis=1)[:, -3:]
        second = mx.sort(mx.where(mask, z, -1e9), axis=1)[:, -4:]
        return mx.sum(mx.square(mx.maximum(first, 0))) + 3 * mx.sum(mx.square(mx.maximum(second, 0)))

    np.testing.assert_allclose(
        np.array(mx.grad(loss)(w)), np.array(mx.grad(definition)(w)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask=mx.zeros(9, dtype=mx.bool_)), "mask must be bool of shape [d_sae] = [20]"),
        (dict(mask=mx.zeros(20)), "mask must be bool"),
        (dict(k_aux=0), "k_aux must be in (0, d_sae] but got k_aux=0"),
    ],
)
def test_malformed_mask(change, message):
    args = dict(mask=mx.zeros(20, dtype=mx.bool_), k=2, k_aux=3) | change
    with pytest.raises(ValueError) as e:
        ops.topk_encode_masked(mx.zeros((2, 4)), mx.zeros((20, 4)), **args)
    assert message in str(e.value)


@pytest.mark.parametrize("n", [1, 5, 31, 100, 200])
def test_ties_of_nan_go_to_the_lowest_features(n: int) -> None:
    """Of a token that is NaN everywhere, and of one with more NaN than a first guess at the bound expects."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((n, 40)).astype(np.float32), rng.standard_normal((8200, 40)).astype(np.float32)
    x[n // 2, 3] = np.nan
    got = ops.topk_encode(mx.array(x), mx.array(w), k=64)
    np.testing.assert_array_equal(np.array(got.indices)[n // 2], np.arange(64))
    x[n // 2, 3] = 1
    some = np.r_[3:40, 5000:5080:3]  # 64 in all, most in the sample
    w[some] = np.nan
    got = ops.topk_encode(mx.array(x), mx.array(w), k=len(some) - 2)
    for row in np.array(got.indices):
        np.testing.assert_array_equal(row, some[:-2])
