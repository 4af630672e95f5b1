"""Adam that spares the rows of features without entries: lazily, which changes no bit, and row-sparse, another optimiser."""

from __future__ import annotations

import contextlib

import mlx.core as mx
import numpy as np
import pytest

import oracle
from mlxsae import SparseCode, ops
from mlxsae.ops import Params, Term
from test_feature_update import NAMES, in_bfloat16, mlx_args, problem
from tools import numpy

WINDOW = 5


def codes(rng, steps, n, d_sae, k):
    """Some features in every step, some in a few, some in none; some slots unused."""
    often = rng.random(d_sae) ** 3
    for _ in range(steps):
        order = np.argsort(-often * rng.random((n, d_sae)), axis=1)[:, :k]
        values = rng.standard_normal((n, k)) * (rng.random((n, k)) > 0.2)
        yield SparseCode(
            mx.array(values.astype(np.float32)), mx.array(np.sort(order, axis=1).astype(np.uint32))
        )


@pytest.mark.parametrize("moments", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_lazy_steps_are_the_dense_ones_bit_by_bit(moments, normalize, clip):
    """Rows catch up before they are read, or once in WINDOW steps; rates change, and a step is skipped."""
    rng = np.random.default_rng(0)
    n, d_in, d_out, d_sae, k = 6, 37, 70, 60, 4
    x, _, params, m, v = mlx_args(*problem(rng, n, d_in, d_out, d_sae, k, 1))
    v = Params(*(1e-3 * a for a in v))
    if moments == mx.bfloat16:
        m, v = in_bfloat16(m), in_bfloat16(v)
    dense, lazy = (params, m, v), (params, m, v)
    last_step, rates = mx.zeros(d_sae, mx.int32), []
    options = dict(betas=(0.9, 0.99), eps=1e-8)
    for step, code in enumerate(codes(rng, 4 * WINDOW, n, d_sae, k), start=1):
        lr = 1e-2 / step
        residual = mx.array(rng.standard_normal((n, d_out)).astype(np.float32))
        given = dict(
            loss=mx.array(np.nan if step == 7 else 1.0), lr=lr, step=step, clip_norm=clip,
            project_decoder=normalize, normalize_decoder=normalize, **options,
        )  # fmt: skip
        terms = [Term(residual, code, mx.array(0.1))]
        dense = ops.feature_update(x, terms, *dense, **given)[:3]
        touched = ops.update_tokens_since_fired(mx.ones(d_sae, mx.int32), code) == 0
        w, mw, vw = (p.w_dec for p in lazy)
        if rates:
            due = touched | (mx.arange(d_sae) % WINDOW == step % WINDOW)
            w, mw, vw, last_step = ops.adam_catch_up(
                w, mw, vw, last_step, due, step=step - 1, lr=rates, normalize=normalize, **options
            )
        caught = [p._replace(w_dec=a) for p, a in zip(lazy, (w, mw, vw), strict=True)]
        lazy = ops.feature_update(x, terms, *caught, untouched="keep_decoder", **given)[:3]
        if step == 7:
            rates = [*rates, float("nan")][-WINDOW:]
        else:
            rates = [*rates, lr][-WINDOW:]
            last_step = mx.where(touched, step, last_step)
        mx.eval(dense, lazy, last_step)
        for name in ("w_enc", "b_enc", "b_dec"):
            for a, b in zip(dense, lazy, strict=True):
                assert mx.array_equal(getattr(a, name), getattr(b, name)).item(), (step, name)
    behind = np.array(last_step) < step
    assert behind.any()
    assert not behind.all()
    assert not mx.array_equal(dense[0].w_dec, lazy[0].w_dec).item()
    got = ops.adam_catch_up(
        *(p.w_dec for p in lazy), last_step, mx.ones(d_sae, mx.bool_), step=step, lr=rates, normalize=normalize, **options
    )  # fmt: skip
    for a, b in zip(dense, got, strict=False):
        np.testing.assert_array_equal(numpy(a.w_dec), numpy(b))
    np.testing.assert_array_equal(np.array(got[3]), step)


@pytest.mark.parametrize("moments", [mx.float32, mx.bfloat16])
def test_catch_up_equals_its_definition_and_the_oracle(moments):
    rng = np.random.default_rng(1)
    d_sae, d, step = 50, 33, 9
    w, m, v = (mx.array(rng.standard_normal((d_sae, d)).astype(np.float32)) for _ in range(3))
    w, m, v = w / mx.linalg.norm(w, axis=1, keepdims=True), (0.1 * m).astype(moments), (v * v).astype(moments)
    last_step = mx.array(rng.integers(4, step + 2, d_sae), mx.int32)
    rows = mx.array(rng.random(d_sae) > 0.3)
    rates = [0.01, 0.02, float("nan"), 0.04, 0.05]
    args = dict(step=step, lr=rates, betas=(0.8, 0.95), eps=1e-6)
    got = ops.adam_catch_up(w, m, v, last_step, rows, **args)
    with ops.plain():
        defined = ops.adam_catch_up(w, m, v, last_step, rows, **args)
    want = [numpy(a).astype(np.float64) for a in (w, m, v)]
    for j in range(d_sae):
        for t in range(last_step[j].item() + 1, step + 1) if rows[j].item() else ():
            lr = rates[t - step - 1]
            if np.isnan(lr):
                continue
            old = (a[j] for a in want)
            want[0][j], want[1][j], want[2][j] = oracle.adam(
                *old, 0.0, lr=lr, step=t, betas=(0.8, 0.95), eps=1e-6
            )
            want[0][j] /= np.linalg.norm(want[0][j])
    tolerance = 1e-5 if moments == mx.float32 else 0.05
    for a, b, exact, old in zip(got, defined, want, (w, m, v), strict=False):
        assert a.dtype == b.dtype == old.dtype
        np.testing.assert_allclose(numpy(a), exact, rtol=tolerance, atol=0.1 * tolerance)
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=tolerance, atol=0.1 * tolerance)
        stay = ~np.array(rows) | (np.array(last_step) >= step)
        np.testing.assert_array_equal(numpy(a)[stay], numpy(old)[stay])
    for made in (got[3], defined[3]):
        expected = np.where(np.array(rows), np.maximum(np.array(last_step), step), np.array(last_step))
        np.testing.assert_array_equal(np.array(made), expected)


@pytest.mark.parametrize("context", [contextlib.nullcontext, ops.plain])
@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize(("n", "d_sae", "k"), [(6, 60, 4), (150, 45, 32)])
def test_untouched_rows_stay_and_touched_ones_make_the_dense_step(context, shadow, n, d_sae, k):
    rng = np.random.default_rng(2)
    x, terms, params, m, v = mlx_args(*problem(rng, n, 40, 40, d_sae, k, 2))
    given = dict(loss=mx.array(1.0), lr=1e-2, step=3, clip_norm=0.5, b_dec_to_input=True)
    with context():
        if shadow:
            given["shadow"] = ops.encoder_shadow(params.w_enc)
        dense = ops.feature_update(x, terms, params, m, v, **given)
        out = {
            how: ops.feature_update(x, terms, params, m, v, untouched=how, **given)
            for how in ("step", "keep_decoder", "keep")
        }
        silent = np.ones(d_sae, bool)
        for t in terms:
            silent &= np.array(ops.update_tokens_since_fired(mx.ones(d_sae, mx.int32), t.code)) > 0
    if n < 100:
        assert silent.any()
        assert not silent.all()
    kept = {"step": (), "keep_decoder": ("w_dec",), "keep": ("w_enc", "b_enc", "w_dec")}
    for how, got in out.items():
        for group, (mine, full, old) in enumerate(zip(got[:3], dense[:3], (params, m, v), strict=True)):
            for name in NAMES:
                want = numpy(getattr(full, name)).copy()
                if name in kept[how]:
                    want[silent] = numpy(getattr(old, name))[silent]
                np.testing.assert_array_equal(
                    numpy(getattr(mine, name)), want, err_msg=f"{how} {group} {name}"
                )
        assert got.grad_norm.item() == dense.grad_norm.item()
        if shadow:
            with context():
                again = ops.encoder_shadow(got.params.w_enc)
            np.testing.assert_array_equal(np.array(got.shadow.columns), np.array(again.columns))
            assert mx.array_equal(got.shadow.w16, again.w16).item()


def test_a_loss_that_is_not_finite_changes_nothing():
    args = mlx_args(*problem(np.random.default_rng(0), 8, 6, 6, 20, 3, 1))
    for how in ("keep_decoder", "keep"):
        out = ops.feature_update(*args, loss=mx.array(np.inf), lr=0.1, step=1, untouched=how)
        for got, want in zip((*out[0], *out[1], *out[2]), (*args[2], *args[3], *args[4]), strict=True):
            np.testing.assert_array_equal(np.array(got), np.array(want))


def test_buffers_are_reused_and_a_second_reference_is_safe():
    d_sae, d = 20000, 64
    w, m, v = mx.random.normal((d_sae, d)), mx.random.normal((d_sae, d)), mx.ones((d_sae, d))
    last_step, rows = mx.zeros(d_sae, mx.int32), mx.arange(d_sae) % 3 == 0
    mx.eval(w, m, v, last_step, rows)
    kept, old = w, np.array(w)
    out = ops.adam_catch_up(w, m, v, last_step, rows, step=2, lr=[0.1, 0.1])
    mx.eval(out)
    np.testing.assert_array_equal(np.array(kept), old)
    del w, m, v, last_step, kept
    one = out[0].nbytes
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = ops.adam_catch_up(*out, rows, step=4, lr=[0.1, 0.1])
    mx.eval(out)
    assert mx.get_peak_memory() - before < one / 2, "a copy was made"


def test_no_result_depends_on_the_number_of_threads():
    rng = np.random.default_rng(3)
    w, m, v = (mx.array(rng.random((333, 50)).astype(np.float32)) for _ in range(3))
    last_step, rows = mx.array(rng.integers(0, 8, 333), mx.int32), mx.array(rng.random(333) > 0.5)
    before, found = ops.num_threads(), []
    try:
        for threads in (1, 2, 5):
            ops.set_num_threads(threads)
            out = ops.adam_catch_up(w, m, v, last_step, rows, step=7, lr=[0.1] * 8)
            found.append([np.array(a).tobytes() for a in out])
    finally:
        ops.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_sizes_at_the_edges():
    for d_sae, d in ((0, 4), (3, 0), (1, 1)):
        w = mx.ones((d_sae, d))
        out = ops.adam_catch_up(
            w, w, w, mx.zeros(d_sae, mx.int32), mx.ones(d_sae, mx.bool_), step=1, lr=[0.1]
        )
        assert [a.shape for a in out] == [(d_sae, d)] * 3 + [(d_sae,)]
        mx.eval(out)


W = mx.zeros((20, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w=mx.zeros((20, 6), mx.float16)), "w must be float32 [d_sae, d] but got float16"),
        (dict(w=mx.zeros(20)), "w must be float32 [d_sae, d]"),
        (dict(m=mx.zeros((20, 5))), "m and v must have the shape of w (20,6)"),
        (dict(v=W.astype(mx.bfloat16)), "m and v must have the shape of w (20,6) and one type"),
        (dict(m=W.astype(mx.float16), v=W.astype(mx.float16)), "must be float32 or bfloat16"),
        (dict(last_step=mx.zeros(20)), "last_step must be int32 of shape [d_sae] = [20] but got float32"),
        (dict(last_step=mx.zeros(19, mx.int32)), "last_step must be int32 of shape [d_sae] = [20]"),
        (dict(rows=mx.zeros(20, mx.int32)), "rows must be bool of shape [d_sae] = [20] but got int32"),
        (dict(step=0), "step must be at least 1 but got 0"),
        (dict(lr=[]), "lr must hold the rate of the last step but is empty"),
    ],
)
def test_malformed(change, message):
    args = dict(w=W, m=W, v=W, last_step=mx.zeros(20, mx.int32), rows=mx.ones(20, mx.bool_), step=1, lr=[0.1])
    with pytest.raises(ValueError) as e:
        ops.adam_catch_up(**(args | change))
    assert message in str(e.value)


def test_a_row_that_has_missed_more_steps_than_there_are_rates():
    last_step = mx.array([3, 1, 3], mx.int32)
    w = mx.ones((3, 4))
    with pytest.raises(
        RuntimeError, match=r"more steps than lr has rates, 2, but row 1 has made step 1 of 4"
    ):
        mx.eval(ops.adam_catch_up(w, w, w, last_step, mx.ones(3, mx.bool_), step=4, lr=[0.1, 0.1]))
    mx.eval(ops.adam_catch_up(w, w, w, last_step, last_step == 3, step=4, lr=[0.1, 0.1]))


@pytest.mark.parametrize("context", [contextlib.nullcontext, ops.plain])
def test_the_last_step_that_int32_holds(context):
    last = 2**31 - 1
    w = mx.ones((3, 4))
    last_step = mx.array([last - 2, last - 1, last], mx.int32)
    with context():
        out = ops.adam_catch_up(
            w, w, w, last_step, mx.ones(3, mx.bool_), step=last, lr=[0.5, 0.25], normalize=False
        )
        mx.eval(out)
    np.testing.assert_allclose(np.array(out.m)[:, 0], [0.81, 0.9, 1], rtol=1e-6)
    np.testing.assert_array_equal(np.array(out.last_step), last)


def test_untouched_must_be_a_name():
    args = mlx_args(*problem(np.random.default_rng(0), 8, 6, 6, 20, 3, 1))
    with pytest.raises(ValueError, match="untouched must be step, keep_decoder or keep but got lazy"):
        ops.feature_update(*args, loss=mx.array(1.0), lr=0.1, step=1, untouched="lazy")


def test_no_derivative():
    rest = (W, W, mx.zeros(20, mx.int32), mx.ones(20, mx.bool_))
    with pytest.raises(ValueError, match="no derivative"):
        mx.grad(lambda w: ops.adam_catch_up(w, *rest, step=1, lr=[0.1])[0].sum())(W)
