"""The one-pass backward and Adam step against the oracle, its definition, and what it promises about memory and bits."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import oracle
from mlxsae import SparseCode, ops
from mlxsae.ops import Params, Term
from tools import graph_of, numpy

NAMES = Params._fields


def problem(rng, n, d_in, d_out, d_sae, k, n_terms):
    def code():
        indices = np.sort(np.stack([rng.permutation(d_sae)[:k] for _ in range(n)]), axis=1).astype(np.uint32)
        return np.maximum(rng.standard_normal((n, k)), 0), indices

    params = Params(
        rng.standard_normal((d_sae, d_in)),
        rng.standard_normal(d_sae),
        rng.standard_normal((d_sae, d_out)),
        rng.standard_normal(d_out),
    )
    params = params._replace(w_dec=params.w_dec / np.linalg.norm(params.w_dec, axis=1, keepdims=True))
    x = rng.standard_normal((n, d_in))
    terms = [(rng.standard_normal((n, d_out)), *code(), 2 / n / (q + 1)) for q in range(n_terms)]
    m = Params(*(0.1 * rng.standard_normal(a.shape) for a in params))
    v = Params(*(0.1 * rng.random(a.shape) for a in params))
    f32 = lambda a: np.asarray(a, np.float32)  # noqa: E731
    return (
        f32(x),
        [(f32(r), f32(c), i, s) for r, c, i, s in terms],
        *(Params(*map(f32, p)) for p in (params, m, v)),
    )


def mlx_args(x, terms, params, m, v):
    return (
        mx.array(x),
        [Term(mx.array(r), SparseCode(mx.array(c), mx.array(i)), mx.array(s)) for r, c, i, s in terms],
        *(Params(*map(mx.array, p)) for p in (params, m, v)),
    )


@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "d_sae", "k"),
    [
        (1, 1, 1, 1, 1),
        (33, 31, 48, 70, 5),
        (64, 100, 100, 31, 31),
        (7, 16, 3, 500, 2),
        (300, 600, 520, 24, 12),  # long buckets, walked in blocks of tokens
        (150, 70, 133, 45, 32),  # features that so many tokens use that dense products are cheaper
    ],
)
@pytest.mark.parametrize(
    ("n_terms", "project", "clip"), list(itertools.product([1, 2, 4], [True, False], [0.0, 0.5]))
)
def test_equals_the_oracle(n, d_in, d_out, d_sae, k, n_terms, project, clip):
    rng = np.random.default_rng(d_sae)
    x, terms, params, m, v = problem(rng, n, d_in, d_out, d_sae, k, n_terms)
    through = d_in == d_out
    options = dict(lr=1e-2, step=3, b_dec_to_input=through, clip_norm=clip)
    for run in (lambda f, *a, **q: f(*a, **q), graph_of):
        out = run(
            ops.feature_update,
            *mlx_args(x, terms, params, m, v),
            loss=mx.array(1.0),
            project_decoder=project,
            normalize_decoder=project,
            **options,
        )
        as64 = lambda p: {name: a.astype(np.float64) for name, a in zip(NAMES, p, strict=True)}  # noqa: E731
        want = oracle.feature_update(
            x.astype(np.float64),
            terms,
            as64(params),
            as64(m),
            as64(v),
            project=project,
            normalize=project,
            **options,
        )
        for got, exact in zip(out[:3], want[:3], strict=True):
            for name in NAMES:
                np.testing.assert_allclose(
                    numpy(getattr(got, name)), exact[name], rtol=1e-4, atol=2e-5, err_msg=name
                )
        np.testing.assert_allclose(out[3].item(), want[3], rtol=1e-4)


@pytest.mark.parametrize(("n", "d_in", "d_out"), [(200, 70, 133), (340, 4190, 4202)])  # one block; several
def test_dense_and_sparse_routes_agree(n, d_in, d_out):
    """A term is a dense product over its features where they are few, a walk over entries where others join in."""
    rng = np.random.default_rng(n)
    d_sae, dead = 540, 520 if d_in > 1000 else 40
    x, terms, params, m, v = problem(rng, n, d_in, d_out, d_sae, 3, 1)
    aux = np.sort(rng.permuted(np.tile(np.arange(dead), (n, 1)), axis=1)[:, : dead // 2], axis=1)
    values = np.maximum(rng.standard_normal(aux.shape), -0.5).astype(np.float32)
    values[:, 0] = 1.0
    residual = rng.standard_normal((n, d_out)).astype(np.float32)

    def update(parts):
        """The auxiliary term as several: each holds only a part of the tokens' entries, so none is dense alone."""
        aux_terms = []
        for i in range(parts):
            mine = np.where((np.arange(n) % parts == i)[:, None], values, 0)
            aux_terms.append((residual, mine, aux.astype(np.uint32), 0.3))
        args = mlx_args(x, terms + aux_terms, params, m, v)
        out = ops.feature_update(
            *args, loss=mx.array(1.0), lr=1e-2, step=3, clip_norm=0.7, b_dec_to_input=False
        )
        mx.eval(out)
        return out

    dense, sparse, again = update(1), update(6), update(1)
    for group in range(3):
        for name, a, b, c in zip(NAMES, dense[group], sparse[group], again[group], strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(c))
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(dense[3].item(), sparse[3].item(), rtol=1e-5)


@pytest.mark.parametrize("whose", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("few", [False, True])
def test_a_feature_twice_in_a_token_counts_twice(whose, few):
    """Such a feature has no place in a matrix: it is walked, however often this term or another uses it."""
    rng = np.random.default_rng(0)
    n, d, d_sae = 64, 20, 50
    x, terms, params, m, v = problem(rng, n, d, d, d_sae, 40, 2)
    for q in whose:
        residual, values, indices, scale = terms[q]
        indices = indices.copy()
        if few:
            indices[:, 1] = indices[:, 0] = 5
        else:
            indices = np.repeat(indices[:, ::2], 2, axis=1)
        terms[q] = (residual, values, indices, scale)
    out, want = (
        run(
            ops.feature_update,
            *mlx_args(x, terms, params, m, v),
            loss=mx.array(1.0),
            lr=1e-2,
            step=1,
        )
        for run in (lambda f, *a, **q: f(*a, **q), graph_of)
    )
    for got, exact in zip((*out[0], *out[1]), (*want[0], *want[1]), strict=True):
        np.testing.assert_allclose(np.array(got), np.array(exact), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out[3].item(), want[3].item(), rtol=1e-5)


@pytest.mark.parametrize("where", ["x", "residual"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_uses_nothing_adds_nothing(where, value):
    """Whatever its rows hold, and also where features are used so often that dense products would be cheaper."""
    n, d, d_sae = 150, 70, 45
    x, terms, params, m, v = problem(np.random.default_rng(0), n, d, d, d_sae, 32, 2)
    for _, values, _, _ in terms:
        values[3] = 0
    outcomes = []
    for held in (1.0, value):
        (x if where == "x" else terms[1][0])[3] = held
        outcomes.append(
            ops.feature_update(*mlx_args(x, terms, params, m, v), loss=mx.array(1.0), lr=1e-2, step=3)
        )
    for got, want in zip((*outcomes[1][0], outcomes[1][3]), (*outcomes[0][0], outcomes[0][3]), strict=True):
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-5)


def test_rows_of_no_length():
    """Nothing is left but the encoder's bias, which has no gradient."""
    args = mlx_args(*problem(np.random.default_rng(0), 3, 0, 0, 5, 2, 1))
    out = ops.feature_update(*args, loss=mx.array(1.0), lr=1e-2, step=1)
    assert out.params.w_enc.shape == out.params.w_dec.shape == (5, 0)
    assert np.isfinite(np.array(out.params.b_enc)).all()


def test_equals_autodiff_with_mlx_adam_over_many_steps():
    """The two engines of the trainer: same start, same parameters."""
    import mlx.optimizers as optim

    mx.random.seed(0)
    n, d, d_sae, k = 64, 24, 200, 4
    w_dec = mx.random.normal((d_sae, d))
    w_dec = w_dec / mx.linalg.norm(w_dec, axis=1, keepdims=True)
    start = Params(w_dec * 1.0, mx.zeros(d_sae), w_dec, mx.zeros(d))
    zeros = Params(*map(mx.zeros_like, start))
    p, m, v = start, zeros, zeros
    tree = dict(zip(NAMES, start, strict=True))
    adam = optim.Adam(learning_rate=1e-3, bias_correction=True)

    def loss_fn(tree, x):
        code = ops.topk_encode(x - tree["b_dec"], tree["w_enc"], tree["b_enc"], k=k)
        return mx.mean(mx.sum(mx.square(ops.sparse_decode(code, tree["w_dec"], tree["b_dec"]) - x), axis=1))

    for step in range(1, 51):
        x = mx.random.normal((n, d)) @ mx.random.normal((d, d), key=mx.random.key(7)) * 0.3
        loss, g = mx.value_and_grad(loss_fn)(tree, x)
        w = tree["w_dec"]
        g["w_dec"] = g["w_dec"] - mx.sum(g["w_dec"] * w, axis=1, keepdims=True) * w
        tree = adam.apply_gradients(g, tree)
        tree["w_dec"] = tree["w_dec"] / mx.linalg.norm(tree["w_dec"], axis=1, keepdims=True)
        code = ops.topk_encode(x - p.b_dec, p.w_enc, p.b_enc, k=k)
        residual, square = ops.decode_residual(code, p.w_dec, x, p.b_dec)
        p, m, v, *_ = ops.feature_update(
            x - p.b_dec,
            [Term(residual, code, mx.array(2 / n))],
            p,
            m,
            v,
            loss=mx.mean(square),
            lr=1e-3,
            step=step,
            b_dec_to_input=True,
        )
        mx.eval(tree, p, m, v)
        np.testing.assert_allclose(mx.mean(square).item(), loss.item(), rtol=1e-4)
    for name, got in zip(NAMES, p, strict=True):
        scale = mx.abs(tree[name]).max().item()
        np.testing.assert_allclose(
            np.array(got), np.array(tree[name]), atol=1e-5 * max(scale, 1e-2), rtol=1e-5
        )


def test_a_loss_that_is_not_finite_changes_nothing():
    args = problem(np.random.default_rng(0), 8, 6, 6, 20, 3, 1)
    for loss in (np.nan, np.inf):
        x, terms, params, m, v = mlx_args(*args)
        p2, m2, v2, norm, _ = ops.feature_update(
            x * np.nan, terms, params, m, v, loss=mx.array(loss), lr=0.1, step=1
        )
        for got, want in zip((*p2, *m2, *v2), (*args[2], *args[3], *args[4]), strict=True):
            np.testing.assert_array_equal(np.array(got), want)
        assert np.isnan(norm.item())


@pytest.mark.parametrize("moments", [mx.float32, mx.bfloat16])
def test_buffers_are_reused_and_a_second_reference_is_safe(moments):
    n, d, d_sae = 4, 64, 20000
    rng = np.random.default_rng(0)
    x, terms, params, m, v = mlx_args(*problem(rng, n, d, d, d_sae, 2, 1))
    if moments == mx.bfloat16:
        m, v = in_bfloat16(m), in_bfloat16(v)
    mx.eval(x, terms, params, m, v)
    one = params.w_enc.nbytes

    def step(state):
        p, m, v, *_ = ops.feature_update(x, terms, *state, loss=mx.array(1.0), lr=0.1, step=1)
        return p, m, v

    state = (params, m, v)
    del params, m, v
    for _ in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        state = step(state)
        mx.eval(state)
        assert mx.get_peak_memory() - before < one / 2, "a copy was made"
    kept, old = state[0].w_enc, np.array(state[0].w_enc)
    state = step(state)
    mx.eval(state)
    np.testing.assert_array_equal(np.array(kept), old)
    assert mx.abs(state[0].w_enc - kept).max().item() > 1e-3


# ------------------------------------------------------------------------------------------ moments in bfloat16


def in_bfloat16(p: Params) -> Params:
    return p._replace(w_enc=p.w_enc.astype(mx.bfloat16), w_dec=p.w_dec.astype(mx.bfloat16))


def in_float32(p: Params) -> Params:
    return Params(*(a.astype(mx.float32) for a in p))


@pytest.mark.parametrize("shape", [(33, 31, 48, 70, 5), (64, 100, 100, 31, 31)])
def test_moments_in_bfloat16_are_those_of_float32_stochastically_rounded(shape):
    """With the oracle's noise, in bits; the definition in plain ops rounds by the same noise."""
    x, terms, params, m, v = mlx_args(*problem(np.random.default_rng(0), *shape, 2))
    m, v = in_bfloat16(m), in_bfloat16(v)
    options = dict(loss=mx.array(1.0), lr=1e-2, step=70_000, clip_norm=0.5)
    wide = ops.feature_update(x, terms, params, in_float32(m), in_float32(v), **options)
    with ops.plain():
        defined = ops.feature_update(x, terms, params, m, v, **options)
    got = ops.feature_update(x, terms, params, m, v, **options)
    for a, b in zip(got.params, wide.params, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))
    for second, (mine, exact, plain) in enumerate(zip(got[1:3], wide[1:3], defined[1:3], strict=True)):
        for i, name in enumerate(NAMES):
            a, b, c = (getattr(p, name) for p in (mine, exact, plain))
            if i % 2:
                assert a.dtype == mx.float32
                np.testing.assert_array_equal(np.array(a), np.array(b))
                continue
            want = oracle.stochastic_bfloat16(np.array(b), step=70_000, matrix=i // 2, second=bool(second))
            np.testing.assert_array_equal(np.array(a.view(mx.uint16)), want)
            # The definition adds in another order: here and there a number lies on the other side of its noise.
            assert mx.mean(a == c).item() > 0.99


def test_small_changes_add_up_in_bfloat16():
    """No gradient for 400 steps: v falls by a thousandth a step, m by a hundredth. To the nearest, v would stay."""
    shape = (64, 200)
    ones = Params(mx.ones(shape), mx.ones(shape[0]), mx.ones(shape), mx.ones(shape[1]))
    terms = [
        Term(
            mx.zeros((1, shape[1])),
            SparseCode(mx.zeros((1, 1)), mx.zeros((1, 1), mx.uint32)),
            mx.array(1.0),
        )
    ]
    m = v = in_bfloat16(ones)
    params = ones
    for step in range(1, 401):
        params, m, v, *_ = ops.feature_update(
            mx.zeros((1, shape[1])),
            terms,
            params,
            m,
            v,
            loss=mx.array(1.0),
            lr=0.0,
            step=step,
            betas=(0.99, 0.999),
        )
        mx.eval(params, m, v)
    for moment, beta in ((m, 0.99), (v, 0.999)):
        for a in (moment.w_enc, moment.w_dec):
            a = np.array(a.astype(mx.float32), np.float64)
            # Each step adds noise of at most half the distance of neighbours, 2^-8 or 2^-9 of the number.
            error = 2.0**-8 / np.sqrt(2 * (1 - beta)) / np.sqrt(a.size)
            assert abs(a.mean() / beta**400 - 1) < 5 * error
            assert a.std() / a.mean() < 0.1
    assert mx.array(0.999).astype(mx.bfloat16).item() == 1  # to the nearest: what is avoided


def test_bfloat16_keeps_nan_infinity_and_what_it_can_hold():
    shape = (2, 8)
    given = mx.broadcast_to(mx.array([0.0, -3e-39, np.inf, np.nan, 1.5, -2.0, 3e38, 1e-40]), shape)
    zeros = Params(mx.zeros(shape), mx.zeros(2), mx.zeros(shape), mx.zeros(8))
    m = in_bfloat16(zeros._replace(w_enc=given, w_dec=given))
    kept = [np.array(a.view(mx.uint16)) for a in (m.w_enc, m.w_dec)]
    code = SparseCode(mx.zeros((1, 1)), mx.zeros((1, 1), mx.uint32))
    for context in (ops.plain, contextlib.nullcontext):
        with context():
            out = ops.feature_update(
                mx.zeros((1, 8)), [Term(mx.zeros((1, 8)), code, mx.array(1.0))], zeros, m, m,
                loss=mx.array(1.0), lr=0.0, step=1, betas=(1.0, 1.0), normalize_decoder=False,
            )  # fmt: skip
            for moment in out[1:3]:
                for a, want in zip((moment.w_enc, moment.w_dec), kept, strict=True):
                    a = np.array(a.view(mx.uint16))
                    finite = [0, 2, 4, 5, 6]
                    np.testing.assert_array_equal(a[:, finite], want[:, finite])
                    assert (a[:, 3] & 0x7FFF > 0x7F80).all()  # NaN


PROGRAM = """
import hashlib, sys, numpy as np, mlx.core as mx
from mlxsae import ops
from mlxsae.ops import Params, Term
mx.random.seed(0)
n, d, F = 100, 50, 3000
w = mx.random.normal((F, d)); w = w / mx.linalg.norm(w, axis=1, keepdims=True)
p = Params(w, mx.zeros(F), w * 1.0, mx.zeros(d)); z = Params(*map(mx.zeros_like, p)); m, v = z, z
for step in range(1, 6):
    x = mx.random.normal((n, d)); code = ops.topk_encode(x - p.b_dec, p.w_enc, p.b_enc, k=8)
    r, s = ops.decode_residual(code, p.w_dec, x, p.b_dec)
    p, m, v, g, _ = ops.feature_update(x - p.b_dec, [Term(r, code, mx.array(0.02))], p, m, v, loss=mx.mean(s), lr=1e-2,
                                    step=step, b_dec_to_input=True, clip_norm=1.0)
    mx.eval(p, m, v)
print(hashlib.sha256(b"".join(np.array(a).tobytes() for a in (*p, *m, *v))).hexdigest())
"""


def test_same_bits_in_every_run_and_with_every_number_of_threads():
    def run(threads):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "MLXSAE_NUM_THREADS": str(threads)},
        )
        return out.stdout

    assert run(1) == run(1) == run(2) == run(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(step=0), "step must be at least 1"),
        (dict(terms=[]), "terms must hold the main term"),
        (dict(loss=mx.zeros(3)), "loss must be one number but got shape (3)"),
        (dict(loss=mx.zeros(0)), "loss must be one number"),
        (dict(clip_norm=-1.0), "clip_norm must be at least 0 but got -1"),
        (dict(clip_norm=float("nan")), "clip_norm must be at least 0"),
        (dict(x=mx.zeros((7, 6))), "must fit x"),
        (dict(x=mx.zeros((8, 5))), "must fit x"),
        (dict(x=mx.zeros((8, 6), dtype=mx.float16)), "must be float32"),
        (dict(params=lambda p: p._replace(w_enc=mx.array(1.0))), "w_enc [d_sae, d_in], b_enc [d_sae]"),
        (dict(m=Params(*(mx.zeros(3),) * 4)), "the shapes of their parameters but got (3) for (20,6)"),
        (dict(m=lambda p: p._replace(w_enc=p.w_enc.astype(mx.float16))), "must be float32 or bfloat16"),
        (dict(m=lambda p: p._replace(w_dec=p.w_dec.astype(mx.bfloat16))), "moments of both matrices must be"),
        (dict(v=lambda p: in_bfloat16(p)), "moments of both matrices must be"),
        (dict(v=lambda p: p._replace(b_enc=p.b_enc.astype(mx.bfloat16))), "moments of biases must be"),
    ],
)
def test_malformed(change, message):
    x, terms, params, m, v = mlx_args(*problem(np.random.default_rng(0), 8, 6, 6, 20, 3, 1))
    args = dict(x=x, terms=terms, params=params, m=m, v=v, step=1, loss=mx.array(1.0), clip_norm=0.0)
    args |= {name: new(args[name]) if callable(new) else new for name, new in change.items()}
    with pytest.raises(ValueError) as e:
        ops.feature_update(
            args["x"],
            args["terms"],
            args["params"],
            args["m"],
            args["v"],
            loss=args["loss"],
            clip_norm=args["clip_norm"],
            lr=0.1,
            step=args["step"],
        )
    assert message in str(e.value)


def test_no_derivative():
    x, terms, params, m, v = mlx_args(*problem(np.random.default_rng(0), 8, 6, 6, 20, 3, 1))
    with pytest.raises(ValueError, match="no derivative"):
        mx.grad(lambda x: ops.feature_update(x, terms, params, m, v, loss=mx.array(1.0), lr=0.1, step=1)[3])(
            x
        )
