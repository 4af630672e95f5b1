"""Certified low precision: the same bits as the float32 kernel, whatever the data; and attempts to break its bound."""

from __future__ import annotations

import contextlib
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsae import ops

TYPES = (mx.bfloat16, mx.int16, mx.int8)
KERNEL = ops.backends()["topk_encode"]["cpu"]


def same_bits(x, w, b, k, types=TYPES):
    x, w, b = (mx.array(np.asarray(a, np.float32)) for a in (x, w, b))
    want = ops.topk_encode(x, w, b, k=k)
    all_want, threshold = ops.batch_topk_encode(x, w, b, k=k)
    for dtype in types:
        shadow = ops.encoder_shadow(w, dtype=dtype)
        got = ops.topk_encode(x, w, b, k=k, shadow=shadow)
        np.testing.assert_array_equal(np.array(got.indices), np.array(want.indices))
        np.testing.assert_array_equal(np.array(got.values), np.array(want.values))
        # a good hint, a low one, one within the margin, one that hides what is wanted
        for off in (1.0, 0.7, 1.04, 1.5):
            got, again = ops.batch_topk_encode(x, w, b, k=k, hint=off * threshold, shadow=shadow)
            for a, c in zip((*got, again), (*all_want, threshold), strict=True):
                np.testing.assert_array_equal(np.array(a), np.array(c))


@pytest.mark.parametrize(
    ("dtype", "sets"), [(mx.bfloat16, ("bf16",)), (mx.int16, ("avx2", "avx512")), (mx.int8, ("vnni", "bf16"))]
)
def test_this_machine(dtype, sets):
    """Everything here holds on every machine; it tests the screen where the processor has a product for the shadow."""
    if not any(name in KERNEL for name in sets):
        pytest.skip(f"this processor screens no shadow of {dtype}: the float32 kernel ran in its place")


def test_the_default_is_what_this_processor_screens_with():
    bytes_, integers = ("vnni" in KERNEL or "bf16" in KERNEL), ("avx2" in KERNEL or "avx512" in KERNEL)
    want = mx.int8 if bytes_ else mx.int16 if integers else mx.bfloat16
    assert ops.encoder_shadow(mx.ones((3, 4))).w16.dtype == want


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([32, 33, 64, 100, 130, 300]),
    st.sampled_from([1, 2, 3, 31, 32, 33, 64, 129, 300]),
    st.sampled_from([64, 500, 4097, 6001]),
    st.integers(1, 40),
    st.sampled_from(
        [
            "gauss",
            "shared mean",
            "tiny",
            "small",
            "huge",
            "sparse",
            "integers",
            "near bfloat16",
            "near integers",
            "near bytes",
            "one large",
            "few large",
            "heavy tails",
            "cancelling",
        ]
    ),
    st.integers(0, 10**6),
)
def test_same_bits_as_float32(n, d, d_sae, k, kind, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((n, d)), rng.standard_normal((d_sae, d)) / np.sqrt(d)
    b = 0.1 * rng.standard_normal(d_sae)
    if kind == "shared mean":
        x = x + 30 * rng.standard_normal(d)
    elif kind == "tiny":  # products are subnormal, and flushed to zero by the bfloat16 product
        x, w, b = x * 1e-22, w * 1e-20, b * 1e-40
    elif kind == "small":  # squares vanish where products do not
        x, b = x * 1e-25, b * 1e-25
    elif kind == "huge":
        x, b = x * 1e15, b * 1e15
    elif kind == "sparse":
        x, w = x * (rng.random((n, d)) < 0.1), w * (rng.random((d_sae, d)) < 0.1)
    elif kind == "integers":  # ties everywhere
        x, w, b = rng.integers(-2, 3, (n, d)), rng.integers(-2, 3, (d_sae, d)), rng.integers(-1, 2, d_sae)
    elif kind == "near bfloat16":  # halfway between two bfloat16: the largest rounding there is
        x, w = np.sign(x) * (1 + 2.0**-8), np.sign(w) * (1 + 2.0**-8 + 2.0**-20 * rng.random((d_sae, d)))
    elif kind == "near integers":  # halfway between two integers of the shadow, all roundings the same way
        x, w = np.sign(x) * (0.5 + np.abs(x).round()), np.sign(w) * (0.5 + np.abs(30 * w).round())
        x[:, -1], w[:, -1] = (2.0**15 for _ in range(2))
    elif kind == "near bytes":  # halfway between two bytes of the shadow and of the token
        x, w = np.sign(x) * (0.5 + np.abs(20 * x).round()), np.sign(w) * (128 + 256 * np.abs(20 * w).round())
        x[:, -1], w[:, -1] = 127, 127 * 256
    elif kind == "few large":  # bytes tell little of these tokens
        x[:, ::17] *= rng.choice([1.0, 100.0], (n, 1))
    elif kind == "one large":  # one coordinate has the whole norm: its integer reaches the end of the range
        x, w = x * 1e-4, w * 1e-4
        x[np.arange(n), rng.integers(0, d, n)] = rng.choice([-1.0, 1.0], n)
        w[np.arange(d_sae), rng.integers(0, d, d_sae)] = rng.choice([-1.0, 1.0], d_sae)
    elif kind == "heavy tails":
        x, w = x * np.exp(4 * rng.standard_normal((n, 1))), w * np.exp(3 * rng.standard_normal((d_sae, 1)))
    elif (
        kind == "cancelling"
    ):  # large terms that cancel: accumulation matters, and the bias is larger than the rest
        x[:, : d // 2] *= 1e4
        w[:, : d // 2] *= 1e-4
        b = 1e3 * (1 + 1e-6 * rng.standard_normal(d_sae))
    same_bits(x, w, b, min(k, d_sae))


def test_worst_case_roundings_do_not_hide_the_best_feature():
    """Every weight of the best feature rounds down and every other one up, by half a unit in the last place."""
    rng = np.random.default_rng(0)
    d, d_sae = 256, 5000
    x = np.abs(rng.standard_normal((64, d)))
    base = np.exp2(rng.integers(-3, 3, (d_sae, d)).astype(float))
    w = base * (1 + 2.0**-8 * (1 + 1e-3))  # rounds up to 1 + 2^-7
    w[4321] = base[100] * (1 + 2.0**-8 * (1 - 1e-3))  # rounds down to 1
    w[100] = base[100] * (1 + 2.0**-8 * (1 - 2e-3))
    same_bits(x, w, np.zeros(d_sae), 5)


def test_sums_of_integers_do_not_overflow():
    """Rows that are parallel: their product is the largest there is, 2^30 in units of the shadow; and wide ones of bytes."""
    rng = np.random.default_rng(0)
    for d in (1, 2, 33, 1000):
        direction = rng.choice([-1.0, 1.0], d)
        w = direction * (1 + 1e-3 * rng.standard_normal((5000, 1))) + 1e-3 * rng.standard_normal((5000, d))
        w[::2] *= -1
        same_bits(direction * np.exp(rng.standard_normal((64, 1))), w, np.zeros(5000), 7)
    for d in (66_000, 140_000):  # 127 * 128 * d is past 2^30, past 2^31
        x = rng.choice([-1.0, 1.0], (32, 1)) * np.ones(d)
        same_bits(
            x, rng.choice([-1.0, 1.0], (64, 1)) * (1 + 1e-3 * rng.standard_normal((64, d))), np.zeros(64), 7
        )


@pytest.mark.parametrize("misled", [3, 64])
def test_the_largest_features_are_those_that_are_seen_first(misled):
    """A screen bounds the k-th largest by what it has seen: where that misleads it the float32 kernel has the word."""
    rng = np.random.default_rng(0)
    d, d_sae, blocks = 64, 6000, 1000
    step = next(
        s for s in range(618, blocks) if math.gcd(s, blocks) == 1
    )  # EvenWalk, csrc/cpu/kernel_screen.h
    first = (6 * (np.arange(16) * step % blocks)[:, None] + np.arange(6)).ravel()
    x, w = rng.standard_normal((64, d)), rng.standard_normal((d_sae, d)) / np.sqrt(d)
    w[:, 0], x[:, 0] = 0, 0
    w[first, 0], x[:misled, 0] = 10 + rng.random(len(first)), 1
    same_bits(x, w, 0.1 * rng.standard_normal(d_sae), 40)


def test_too_many_candidates_go_to_the_float32_kernel():
    """Features that differ by less than 16 bits can tell: nearly all of them are candidates."""
    rng = np.random.default_rng(0)
    w = 1 + 1e-7 * rng.standard_normal((5000, 32))
    same_bits(np.abs(rng.standard_normal((70, 32))), w, np.zeros(5000), 9)


def test_not_finite_inputs():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((70, 16)), rng.standard_normal((5000, 16)), np.zeros(5000)
    x[3, 2] = np.nan
    x[7, 1] = np.inf
    x[9] = 1e30
    same_bits(x, w, b, 5)
    w[17, 3] = np.nan
    same_bits(x, w, b, 5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_bias(value: float):
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((70, 16)), rng.standard_normal((5000, 16)), np.zeros(5000)
    b[4321] = value
    same_bits(x, w, b, 5)


WAYS = (
    "gauss",
    "few large",
    "equal features",
    "ties",
    "bias decides",
    "not finite x",
    "not finite w",
    "not finite b",
    "tiny",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("n", "d", "d_sae", "k"), [(128, 512, 4100, 32), (300, 577, 6001, 40), (129, 1030, 2100, 16)]
)
def test_a_shadow_that_float32_encode_makes_for_itself(n, d, d_sae, k, way):
    """Thirty-one tokens at a time nothing is screened: the float32 kernel itself."""
    rng = np.random.default_rng([n, d])
    x, w = rng.standard_normal((n, d)), rng.standard_normal((d_sae, d)) / np.sqrt(d)
    b = 0.1 * rng.standard_normal(d_sae)
    if way == "few large":
        x[:, ::50] *= rng.choice([1.0, 100.0], (n, 1))
    elif way == "equal features":
        w[1::3] = w[::3][: len(w[1::3])]
        b[:] = 0
    elif way == "ties":
        x, w, b = rng.integers(-1, 2, x.shape), rng.integers(-1, 2, w.shape), rng.integers(-1, 2, d_sae)
    elif way == "bias decides":
        x, b = x * 1e-3, rng.permutation(d_sae) / 16
    elif way == "not finite x":
        x[3, 2], x[7, 1], x[9, 5], x[11] = np.nan, np.inf, -np.inf, 1e30
    elif way == "not finite w":
        w[17, 3], w[100, 5] = np.nan, -np.inf
    elif way == "not finite b":
        b[17], b[d_sae - 1], b[5] = np.nan, np.inf, -np.inf
    elif way == "tiny":
        x, w, b = x * 1e-22, w * 1e-20, b * 1e-40
    x, w, b = (mx.array(np.asarray(a, np.float32)) for a in (x, w, b))
    mask = mx.arange(d_sae) % 20 == 7
    want = [ops.topk_encode(x[t : t + 31], w, b, k=k) for t in range(0, n, 31)]
    got = ops.topk_encode(x, w, b, k=k)
    masked = ops.topk_encode_masked(x, w, b, mask=mask, k=k, k_aux=50)
    aux = [ops.topk_encode_masked(x[t : t + 31], w, b, mask=mask, k=k, k_aux=50)[1] for t in range(0, n, 31)]
    for code, parts in ((got, want), (masked[0], want), (masked[1], aux)):
        np.testing.assert_array_equal(np.array(code.indices), np.concatenate([p.indices for p in parts]))
        np.testing.assert_array_equal(np.array(code.values), np.concatenate([p.values for p in parts]))
    want = ops.batch_topk_encode(x, w, b, k=k)
    for off in (1.0, 0.7, 1.04):
        again = ops.batch_topk_encode(x, w, b, k=k, hint=off * want[1])
        for a, c in zip((*again[0], again[1]), (*want[0], want[1]), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(c))
    # What exceeds a threshold: one for all, which leaves k of a token or very many, and one for each feature.
    least = mx.where(mx.isfinite(want[1]), want[1], 1)
    for threshold in (
        least,
        0.3 * least,
        least * mx.array(rng.uniform(0.8, 2, d_sae), mx.float32),
        mx.abs(1e3 * b),
    ):
        for room in (n * k, 2 * n * k, 64 * n * k):
            got, overflow = ops.threshold_encode_capped(x, w, b, threshold=threshold, capacity=room)
            parts = [ops.threshold_encode(x[t : t + 31], w, b, threshold=threshold) for t in range(0, n, 31)]
            sizes = [p.values.size for p in parts]
            offsets = [
                0,
                *np.concatenate(
                    [np.array(p.offsets)[1:] + s for p, s in zip(parts, np.cumsum([0, *sizes]), strict=False)]
                ),
            ]
            assert overflow.item() == (sum(sizes) > room)
            np.testing.assert_array_equal(np.array(got.offsets), np.minimum(offsets, room))
            for a, parts_of in (
                (got.values, [p.values for p in parts]),
                (got.indices, [p.indices for p in parts]),
            ):
                wanted = np.concatenate(parts_of)[:room]
                np.testing.assert_array_equal(np.array(a)[: len(wanted)], wanted)


def test_masked_selection_with_a_shadow():
    rng = np.random.default_rng(0)
    for n, d_sae, k, k_aux, share in [
        (70, 5000, 9, 40, 0.02),
        (33, 900, 16, 16, 0.3),
        (64, 4500, 8, 50, 0.0),
    ]:
        x, w = (mx.array(rng.standard_normal(s).astype(np.float32)) for s in ((n, 24), (d_sae, 24)))
        mask = mx.array(rng.random(d_sae) < share)
        want = ops.topk_encode_masked(x, w, mask=mask, k=k, k_aux=k_aux)
        got = ops.topk_encode_masked(x, w, mask=mask, k=k, k_aux=k_aux, shadow=ops.encoder_shadow(w))
        for a, b in zip(got, want, strict=True):
            assert mx.array_equal(a.indices, b.indices)
            assert mx.array_equal(a.values, b.values)


@pytest.mark.parametrize("masked", [3, 200])
@pytest.mark.parametrize("overflows", [1, 40])
def test_masked_selection_of_tokens_that_overflow(overflows, masked):
    """A pre-activation of -infinity is as low as none: the slot is filled the same way with a shadow as without."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((64, 16), (500, 16)))
    x[5 : 5 + overflows] = -3e38
    w[100:300] = np.abs(w[100:300]) + 1
    mask = np.zeros(500, bool)
    mask[100 : 100 + masked] = True
    args = (mx.array(x), mx.array(w))
    want = ops.topk_encode_masked(*args, mask=mx.array(mask), k=5, k_aux=10)
    for dtype in TYPES:
        shadow = ops.encoder_shadow(args[1], dtype=dtype)
        got = ops.topk_encode_masked(*args, mask=mx.array(mask), k=5, k_aux=10, shadow=shadow)
        for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("dtype", TYPES)
def test_shadow_is_renewed_by_the_update(dtype):
    from mlxsae.ops import Params, Term

    rng = np.random.default_rng(0)
    w = mx.array(rng.standard_normal((300, 33)).astype(np.float32))
    w = w / mx.linalg.norm(w, axis=1, keepdims=True)
    p = Params(w * 1.0, mx.zeros(300), w, mx.zeros(33))
    zero = Params(*map(mx.zeros_like, p))
    shadow = ops.encoder_shadow(p.w_enc, dtype=dtype)
    x = mx.array(rng.standard_normal((40, 33)).astype(np.float32))
    code = ops.topk_encode(x, p.w_enc, p.b_enc, k=4, shadow=shadow)
    residual, square = ops.decode_residual(code, p.w_dec, x, p.b_dec)
    new = ops.feature_update(
        x,
        [Term(residual, code, mx.array(0.1))],
        p,
        zero,
        zero,
        loss=square.mean(),
        lr=0.01,
        step=1,
        shadow=shadow,
    )
    want = ops.encoder_shadow(new.params.w_enc, dtype=dtype)
    assert new.shadow.w16.dtype == dtype
    assert mx.array_equal(new.shadow.w16, want.w16)
    assert mx.array_equal(new.shadow.columns, want.columns)
    assert not mx.array_equal(new.shadow.w16, shadow.w16)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_columns_bound_what_they_name(dtype, kernels):
    rng = np.random.default_rng(0)
    for d in (1, 31, 1000):
        w = (rng.standard_normal((50, d)) * np.exp(5 * rng.standard_normal((50, 1)))).astype(np.float32)
        w[7] = 0
        with contextlib.nullcontext() if kernels else ops.plain():
            w16, columns = ops.encoder_shadow(mx.array(w), dtype=dtype)
        full, rest, _, *more = np.array(columns).astype(np.float64)
        norm = np.linalg.norm(w.astype(np.float64), axis=1)
        if dtype == mx.bfloat16:
            want = np.array(mx.array(w).astype(mx.bfloat16).astype(mx.float32))
            np.testing.assert_array_equal(np.array(w16.astype(mx.float32)), want)
            low = want.astype(np.float64)
        else:
            whole, scale = np.array(w16).astype(np.float64), 2.0**-15
            if dtype == mx.int8:
                unit, rest8, highs = more
                high, scale = whole[:, :d], scale * (1 + 4 / 256)
                whole = unit[:, None] * high + whole[:, d:]
                assert (np.abs(whole - unit[:, None] * high) <= unit[:, None] / 2).all()
                assert (
                    rest8 >= np.linalg.norm(w - unit[:, None] * high * full[:, None] * scale, axis=1)
                ).all()
                np.testing.assert_array_equal(highs, high.sum(axis=1))
                assert ((unit >= 1) & (unit <= 255) & (np.abs(high) <= 127).all(axis=1)).all()
            low = whole * full[:, None] * scale
            assert (np.linalg.norm(whole, axis=1) <= 2**15 + np.sqrt(d) / 2).all()
            assert (np.abs(w - low) <= 0.501 * full[:, None] * scale + 1e-5 * np.abs(w)).all()
        assert (full >= norm).all()
        assert (rest >= np.linalg.norm(w - low, axis=1)).all()
        assert (full <= 1.01 * norm + 1e-16).all()


@pytest.mark.parametrize(
    ("shadow", "message"),
    [
        (
            lambda w: ops.Shadow(mx.zeros((20, 5), mx.bfloat16), mx.zeros((3, 20))),
            "shadow must be encoder_shadow(w_enc)",
        ),
        (lambda w: ops.Shadow(w, mx.zeros((3, 20))), "shadow must be encoder_shadow(w_enc)"),
        (
            lambda w: ops.Shadow(w.astype(mx.bfloat16), mx.zeros((2, 20))),
            "shadow must be encoder_shadow(w_enc)",
        ),
    ],
)
def test_malformed(shadow, message):
    w = mx.zeros((20, 4))
    with pytest.raises(ValueError, match="dtype must be bfloat16, int16 or int8 but got float16"):
        ops.encoder_shadow(w, dtype=mx.float16)
    with pytest.raises(ValueError) as e:
        ops.topk_encode(mx.zeros((2, 4)), w, k=2, shadow=shadow(w))
    assert message in str(e.value)
    with pytest.raises(ValueError, match="w_enc must be float32 where a shadow is given"):
        ops.topk_encode(mx.zeros((2, 4)), w.astype(mx.float16), k=2, shadow=ops.encoder_shadow(w))
