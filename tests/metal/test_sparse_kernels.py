"""The sparse family of Metal kernels, whole ops through their plans, executed and checked on the CPU.

Every case runs in checked mode (bounds, races within and across threadgroups, uninitialised memory) in three schedules of the
threads, which must give the same bits, and is compared with the oracle.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import msl
import numpy as np
import pytest
import run_plan
from run_plan import from_float, to_float

import oracle
from mlxsae import SparseCode, SparseCodeCSR, _ext, ops

TYPES = ["float", "half", "bfloat"]
RTOL = {t: oracle.RTOL[name] for t, name in zip(TYPES, ("float32", "float16", "bfloat16"), strict=True)}
ROW_BYTES = 16  # what a row must be a multiple of to be read in whole vectors (csrc/gpu/plan.h)

SHAPES = [  # n, d, d_sae, k
    (1, 1, 1, 1),
    (2, 31, 33, 1),
    (9, 33, 48, 48),
    (33, 1000, 31, 2),
    (8, 48, 1000, 32),
    (5, 32, 2, 2),
]


class Code(NamedTuple):
    values: np.ndarray  # [n, k], or [nnz]
    indices: np.ndarray
    offsets: np.ndarray | None
    type: str

    @property
    def n(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self.values, self.indices]

    @property
    def tail(self) -> list[np.ndarray]:
        return [] if self.offsets is None else [self.offsets]

    def sizes(self, suffix: str = "") -> dict[str, Any]:
        k = self.values.shape[1] if self.offsets is None else 0
        compressed = self.offsets is not None
        room = self.values.size
        return {"n": self.n, f"k{suffix}": k, f"room{suffix}": room, f"compressed{suffix}": compressed,
                f"values{suffix}": self.type}  # fmt: skip

    def slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Values and indices [n, k] for the oracle."""
        v = to_float(self.values)
        if self.offsets is None:
            return v, self.indices
        return oracle.csr_to_slots(v, self.indices, self.offsets)


def random_code(rng, n, d_sae, k, type="float", compressed=False, tail=5) -> Code:
    """Some values 0, some negative. Compressed: rows of any length, then `tail` entries of no row, full of rubbish."""
    lengths = rng.integers(0, min(2 * k, d_sae) + 1, n) if compressed else np.full(n, k)
    indices = np.concatenate([np.sort(rng.permutation(d_sae)[:m]) for m in lengths]).astype(np.uint32)
    values = rng.standard_normal(len(indices)) * (rng.random(len(indices)) > 0.3)
    if not compressed:
        return Code(from_float(values.reshape(n, k), type), indices.reshape(n, k), None, type)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = np.concatenate([values, np.full(tail, np.nan)])
    indices = np.concatenate([indices, np.full(tail, 2**32 - 1)]).astype(np.uint32)
    return Code(from_float(values, type), indices, offsets, type)


def random_array(rng, shape, type="float"):
    return from_float(rng.standard_normal(shape), type)


def promoted(a: str, b: str) -> str:
    return a if a == b else "float"


def aligned(*arrays: np.ndarray) -> bool:
    return all(a.shape[-1] * a.itemsize % ROW_BYTES == 0 for a in arrays)


def close(got, want, type):
    got = to_float(got).reshape(want.shape)
    np.testing.assert_allclose(
        got, want, rtol=RTOL[type], atol=0.1 * RTOL[type] * np.abs(want).max(initial=1e-30)
    )


def run(op, inputs, sizes, **options):
    return run_plan.run_in_every_schedule(run_plan.plan(op, **sizes), inputs, **options)


def sparse_decode(code, w, type, bias=None, bias_type=None, **options):
    d_sae, d = w.shape
    rows = [w] if bias is None else [w, bias]
    sizes = code.sizes() | dict(d=d, d_sae=d_sae, w=type, bias=bias is not None, aligned=aligned(*rows))
    sizes["bias_type"] = bias_type or "float"
    return run("sparse_decode", [*code.arrays, *rows, *code.tail], sizes, **options)[0]


def decode_residual(code, w, target, bias=None, **options):
    d_sae, d = w.shape
    sizes = code.sizes() | dict(d=d, d_sae=d_sae, bias=bias is not None, aligned=aligned(w))
    inputs = [*code.arrays, w, target, *([] if bias is None else [bias]), *code.tail]
    return run("decode_residual", inputs, sizes, **options)


def gather_dot(rows, row_type, w, type, code, **options):
    d_sae, d = w.shape
    sizes = code.sizes() | dict(d=d, d_sae=d_sae, rows=row_type, w=type, aligned=aligned(rows, w))
    return run("gather_dot", [rows, w, code.indices, *code.tail], sizes, **options)[0]


def sparse_outer(code, rows, type, d_sae, **options):
    d = rows.shape[1]
    sizes = code.sizes() | dict(d=d, d_sae=d_sae, rows=type, aligned=aligned(rows))
    return run("sparse_outer", [*code.arrays, rows, *code.tail], sizes, **options)[0]


def tokens_since_fired(counts, code, n_tokens, **options):
    sizes = code.sizes() | dict(d_sae=len(counts), n_tokens=n_tokens)
    return run("tokens_since_fired", [counts, *code.arrays, *code.tail], sizes, **options)[0]


def encoder_shadow(w, **options):
    d_sae, d = w.shape
    w16, columns = run("encoder_shadow", [w], dict(d_sae=d_sae, d=d, aligned=aligned(w)), **options)
    return w16.reshape(w.shape), columns.reshape(3, d_sae)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("value_type", "type"), itertools.product(TYPES, TYPES))
@pytest.mark.parametrize(("n", "d", "d_sae", "k"), SHAPES)
def test_products_equal_the_oracle(n, d, d_sae, k, value_type, type, compressed):
    """decode, gather-dot and outer product, with every pair of types."""
    rng = np.random.default_rng(n + d_sae)
    code = random_code(rng, n, d_sae, k, value_type, compressed)
    w, bias = random_array(rng, (d_sae, d), type), random_array(rng, d, value_type)
    rows = random_array(rng, (n, d), type)
    left = random_array(rng, (n, d), value_type)
    v, i = code.slots()
    out = promoted(value_type, type)
    close(sparse_decode(code, w, type, bias, value_type), oracle.sparse_decode(v, i, to_float(w), to_float(bias)), out)  # fmt: skip
    close(sparse_decode(code, w, type), oracle.sparse_decode(v, i, to_float(w)), out)
    close(sparse_outer(code, rows, type, d_sae), oracle.sparse_outer(v, i, to_float(rows), d_sae), out)
    dots = gather_dot(left, value_type, w, type, code)
    if compressed:
        want = np.zeros(code.values.size)
        for t, (begin, end) in enumerate(itertools.pairwise(code.offsets)):
            want[begin:end] = to_float(w)[code.indices[begin:end]].astype(np.float64) @ to_float(left)[t]
    else:
        want = oracle.gather_dot(to_float(left), to_float(w), i)
    close(dots, want, out)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (6, 1028, 9, 3)])
def test_decode_residual(shape, compressed):
    n, d, d_sae, k = shape
    rng = np.random.default_rng(d_sae)
    code = random_code(rng, n, d_sae, k, compressed=compressed)
    w, target, bias = random_array(rng, (d_sae, d)), random_array(rng, (n, d)), random_array(rng, d)
    v, i = code.slots()
    for b in (bias, None):
        residual, square = decode_residual(code, w, target, b)
        want = oracle.sparse_decode(v, i, w, b) - target
        close(residual, want, "float")
        close(square, (want**2).sum(1), "float")


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("compressed", [False, True])
def test_tokens_since_fired(type, compressed):
    rng = np.random.default_rng(0)
    for n, d_sae, k in [(1, 1, 1), (33, 100, 5), (64, 31, 31)]:
        code = random_code(rng, n, d_sae, k, type, compressed)
        code.values.reshape(-1)[0] = from_float(np.full(1, np.nan), type)[0]  # NaN counts as firing
        counts = rng.integers(0, 1000, d_sae).astype(np.int32)
        counts[0] = 2**31 - 5
        used = slice(0, None if code.offsets is None else code.offsets[-1])
        values, indices = to_float(code.values)[used], code.indices[used]
        want = oracle.tokens_since_fired(counts, values, indices, n)
        for donate in (False, True):
            got = tokens_since_fired(counts, code, n, donate=donate)
            np.testing.assert_array_equal(got, want)


def check_shadow(w, w16, columns):
    """The rounding, and that the columns bound what they are said to, by little."""
    np.testing.assert_array_equal(w16, from_float(w, "bfloat").reshape(w.shape))
    w64, low = w.astype(np.float64), to_float(w16).astype(np.float64)
    gamma = 2 * (w.shape[1] + 16) * 2.0**-24
    least = (
        np.linalg.norm(w64, axis=1),
        np.linalg.norm(w64 - low, axis=1) + gamma * np.linalg.norm(low, axis=1),
    )
    for got, bound in zip(columns, least, strict=False):
        assert (got >= bound).all()
        assert (got <= 1.001 * bound + 1e-6 * least[0]).all()
    assert (columns[2] > 0).all()


@pytest.mark.parametrize("d", [1, 31, 32, 33, 1000])
def test_encoder_shadow(d):
    w = random_array(np.random.default_rng(d), (37, d))
    check_shadow(w, *encoder_shadow(w))


# ---- the backward pass and update ------------------------------------------------------------------------------------

NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")
LEARNING = dict(lr=1e-2, step=3, betas=(0.9, 0.999), eps=1e-8)


class Term(NamedTuple):
    residual: np.ndarray
    code: Code
    scale: float


class Training(NamedTuple):
    x: np.ndarray
    terms: list[Term]
    params: list[np.ndarray]
    m: list[np.ndarray]
    v: list[np.ndarray]


def training(rng, n, d_in, d_out, d_sae, k, n_terms=1, compressed=False) -> Training:
    def code():
        c = random_code(rng, n, d_sae, k, compressed=compressed)
        positive = np.where(rng.random(c.values.shape) < 0.9, np.maximum(c.values, 0), c.values)
        return c._replace(values=positive.astype(np.float32))

    shapes = [(d_sae, d_in), d_sae, (d_sae, d_out), d_out]
    params = [random_array(rng, s) for s in shapes]
    params[2] /= np.linalg.norm(params[2], axis=1, keepdims=True)
    m = [0.1 * random_array(rng, s) for s in shapes]
    v = [0.1 * rng.random(s).astype(np.float32) for s in shapes]
    terms = [Term(random_array(rng, (n, d_out)), code(), 2 / n / (q + 1)) for q in range(n_terms)]
    return Training(random_array(rng, (n, d_in)), terms, params, m, v)


def narrow(t: Training) -> Training:
    """The same with the moments of both matrices in bfloat16."""
    m, v = ([from_float(a, "bfloat") if a.ndim == 2 else a for a in four] for four in (t.m, t.v))
    return t._replace(m=m, v=v)


def update_sizes(
    t: Training, *, project, normalize, through_input, clip_norm, shadow, untouched="step"
) -> dict[str, Any]:
    (n, d_in), (d_sae, d_out) = t.x.shape, t.params[2].shape
    betas, step = LEARNING["betas"], LEARNING["step"]
    sizes = dict(
        n=n, d_in=d_in, d_out=d_out, d_sae=d_sae, terms=len(t.terms), shadow=shadow,
        aligned=aligned(t.x, t.params[2], *(t.m or [])[:3:2]), step=step,
        moments="bfloat" if t.m and t.m[0].dtype == np.uint16 else "float",
        beta1=betas[0], beta2=betas[1], eps=LEARNING["eps"],
        step_size=LEARNING["lr"] / (1 - betas[0] ** step), inv_sqrt_bias=1 / np.sqrt(1 - betas[1] ** step).item(),
        project=project, normalize=normalize, through_input=through_input, clip_norm=float(clip_norm),
        keep_encoder=untouched == "keep", keep_decoder=untouched != "step",
    )  # fmt: skip
    for q, term in enumerate(t.terms):
        sizes |= term.code.sizes(f"_{q}" if q else "")
    return sizes


def update_inputs(t: Training, loss: float, shadow: bool) -> list[np.ndarray]:
    inputs = [t.x, np.float32([loss])]
    for term in t.terms:
        inputs += [term.residual, *term.code.arrays, np.float32([term.scale])]
    for term in t.terms:
        inputs += term.code.tail
    inputs += [*t.params, *t.m, *t.v]
    if shadow:
        inputs += [from_float(t.params[0], "bfloat"), np.zeros((3, len(t.params[0])), np.float32)]
    return inputs


def feature_update(
    t: Training,
    *,
    loss=1.0,
    project=True,
    normalize=True,
    through_input=False,
    clip_norm=0.0,
    shadow=False,
    untouched="step",
    **options,
):
    """params, m, v, norm of the gradients[, w16, columns] in the shapes of the inputs."""
    sizes = update_sizes(t, project=project, normalize=normalize, through_input=through_input, clip_norm=clip_norm, shadow=shadow, untouched=untouched)  # fmt: skip
    out = run("feature_update", update_inputs(t, loss, shadow), sizes, **options)
    four = [[a.reshape(p.shape) for a, p in zip(out[q : q + 4], t.params, strict=True)] for q in (0, 4, 8)]
    rest = [out[13].reshape(t.params[0].shape), out[14].reshape(3, -1)] if shadow else []
    return [*four, out[12][0], *rest]


def exact_update(
    t: Training, *, project=True, normalize=True, through_input=False, clip_norm=0.0, shadow=False
):
    as64 = lambda p: {name: a.astype(np.float64) for name, a in zip(NAMES, p, strict=True)}  # noqa: E731
    terms = []
    for term in t.terms:
        v, i = term.code.slots()
        terms.append(
            (term.residual.astype(np.float64), v.astype(np.float64), i, float(np.float32(term.scale)))
        )
    params, m, v, norm = oracle.feature_update(
        t.x.astype(np.float64), terms, as64(t.params), as64(t.m), as64(t.v), lr=LEARNING["lr"], step=LEARNING["step"],
        project=project, normalize=normalize, b_dec_to_input=through_input, clip_norm=clip_norm,
    )  # fmt: skip
    return [[p[name] for name in NAMES] for p in (params, m, v)], norm


def check_update(t: Training, run_options: dict, **options):
    got = feature_update(t, shadow=True, **options, **run_options)
    want, norm = exact_update(t, **options)
    for mine, exact in zip(got[:3], want, strict=True):
        for name, a, b in zip(NAMES, mine, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(got[3], norm, rtol=1e-4)
    check_shadow(got[0][0], got[4], got[5])
    return got


UPDATE_SHAPES = [  # n, d_in, d_out, d_sae, k: a row in a simdgroup, in a threadgroup (with one number a thread, with four)
    (1, 1, 1, 1, 1),
    (33, 31, 48, 70, 5),
    (40, 100, 100, 31, 31),
    (7, 16, 3, 500, 2),
    (5, 150, 150, 9, 4),
    (6, 520, 1000, 40, 3),
]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("n_terms", "project", "clip", "compressed"),
    [(1, True, 0.0, False), (2, True, 0.5, True), (4, False, 0.5, False)],
)
@pytest.mark.parametrize("shape", UPDATE_SHAPES)
def test_feature_update_equals_the_oracle(shape, n_terms, project, clip, compressed, donate):
    n, d_in, d_out, d_sae, k = shape
    t = training(np.random.default_rng(d_sae), n, d_in, d_out, d_sae, k, n_terms, compressed)
    options = dict(project=project, normalize=project, through_input=d_in == d_out, clip_norm=clip)
    check_update(t, dict(donate=donate), **options)


@pytest.mark.parametrize(("d_in", "d_out", "clip"), [(2102, 2102, 0.0), (30, 2051, 0.5), (8200, 16, 0.0)])
def test_feature_update_of_rows_beyond_the_registers(d_in, d_out, clip):
    """Rows are walked block by block: of one number a thread (2,048 and more), of four (8,192 and more)."""
    t = training(np.random.default_rng(d_in), 4, d_in, d_out, 7, 3, 2)
    sizes = update_sizes(t, project=True, normalize=True, through_input=False, clip_norm=0, shadow=False)
    kernels = [s["kernel"] for s in run_plan.plan("feature_update", **sizes)["steps"]]
    assert any(k.startswith("feature_update_wide") for k in kernels)
    check_update(t, dict(donate=True), clip_norm=clip, through_input=d_in == d_out)


@pytest.mark.parametrize("shape", [(33, 31, 48, 70, 5), (6, 520, 1000, 40, 3), (4, 8200, 16, 7, 3)])
def test_moments_in_bfloat16_are_those_of_float32_stochastically_rounded(shape):
    """The float32 kernels' results, moved to neighbours by the oracle's noise: in a simdgroup's registers, in a
    threadgroup's, beyond them. The compiler fuses other products in the two kernels, so here and there a number lies on the
    other side of its noise."""
    n, d_in, d_out, d_sae, k = shape
    t = narrow(training(np.random.default_rng(d_sae), n, d_in, d_out, d_sae, k, 2))
    wide = t._replace(m=[to_float(a) for a in t.m], v=[to_float(a) for a in t.v])
    options = dict(clip_norm=0.5, through_input=d_in == d_out)
    got, want = feature_update(t, donate=True, **options), feature_update(wide, **options)
    for mine, theirs in zip(got[0], want[0], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    for second in (False, True):
        for i, (mine, theirs) in enumerate(zip(got[1 + second], want[1 + second], strict=True)):
            if i % 2:
                np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
                continue
            exact = oracle.stochastic_bfloat16(theirs, step=LEARNING["step"], matrix=i // 2, second=second)
            assert (mine == exact).mean() > 0.99
            np.testing.assert_allclose(to_float(mine), to_float(exact), rtol=2**-7, atol=1e-9)
    skipped = feature_update(t, loss=np.inf)
    for mine, given in zip((*skipped[0], *skipped[1], *skipped[2]), (*t.params, *t.m, *t.v), strict=True):
        np.testing.assert_array_equal(mine, given)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    "shape", [(6, 31, 48, 70, 5), (3, 150, 150, 19, 4), (3, 8200, 16, 7, 1), (2, 30, 2051, 7, 2)]
)
@pytest.mark.parametrize(("donate", "shadow"), [(False, False), (True, False), (True, True)])
def test_rows_of_features_without_entries_stay(shape, donate, shadow, bfloat16):
    """Simdgroups, threadgroups, and rows beyond their registers; in the old memory, and in a new one."""
    n, d_in, d_out, d_sae, k = shape
    t = training(np.random.default_rng(d_sae), n, d_in, d_out, d_sae, k, 2)
    t = narrow(t) if bfloat16 else t
    silent = np.ones(d_sae, bool)
    for term in t.terms:
        silent[term.code.indices[term.code.values > 0]] = False
    assert silent.any()
    assert not silent.all()
    options = dict(clip_norm=0.5, through_input=d_in == d_out, shadow=shadow)
    full = feature_update(t, donate=donate, **options)
    for untouched, kept in (("keep_decoder", (2,)), ("keep", (0, 1, 2))):
        got = feature_update(t, donate=donate, untouched=untouched, **options)
        for mine, stepped, old in zip(got[:3], full[:3], (t.params, t.m, t.v), strict=True):
            for i in range(4):
                want = stepped[i].copy()
                if i in kept:
                    want[silent] = old[i][silent]
                np.testing.assert_array_equal(mine[i], want)
        assert got[3] == full[3]
        if shadow:
            check_shadow(got[0][0], got[4], got[5])
        skipped = feature_update(t, donate=donate, untouched=untouched, loss=np.inf)
        for mine, given in zip((*skipped[0], *skipped[1], *skipped[2]), (*t.params, *t.m, *t.v), strict=True):
            np.testing.assert_array_equal(mine, given)


def catch_up(w, m, v, last_step, rows, rates, step, *, normalize=True, **options):
    """w, m, v and last_step in the shapes of the inputs."""
    d_sae, d = w.shape
    betas, first = LEARNING["betas"], step - len(rates) + 1
    corrections = [
        (lr / (1 - betas[0] ** t), 1 / np.sqrt(1 - betas[1] ** t)) for t, lr in enumerate(rates, start=first)
    ]
    sizes = dict(
        d_sae=d_sae, d=d, steps=len(rates), moments="bfloat" if m.dtype == np.uint16 else "float", aligned=aligned(w, m),
        beta1=betas[0], beta2=betas[1], eps=LEARNING["eps"], step=step, normalize=normalize,
    )  # fmt: skip
    out = run("adam_catch_up", [w, m, v, last_step, rows, np.float32(corrections)], sizes, **options)
    return [*(a.reshape(w.shape) for a in out[:3]), out[3]]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("d", [1, 31, 32, 300, 4100])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_rows_that_are_behind_catch_up(d, normalize, donate, bfloat16):
    rng = np.random.default_rng(d)
    d_sae, step, rates = 9, 7, [0.01, float("nan"), 0.03]
    w, m, v = random_array(rng, (d_sae, d)), 0.1 * random_array(rng, (d_sae, d)), rng.random((d_sae, d))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    if bfloat16:
        m, v = from_float(m, "bfloat"), from_float(v.astype(np.float32), "bfloat")
    v = v if bfloat16 else v.astype(np.float32)
    last_step, rows = np.int32([4, 5, 6, 7, 8, 4, 5, 6, 7]), np.arange(d_sae) < 6
    got = catch_up(w, m, v, last_step, rows, rates, step, normalize=normalize, donate=donate)
    want = [to_float(a).astype(np.float64) for a in (w, m, v)]
    for j in range(d_sae):
        for t in range(last_step[j] + 1, step + 1) if rows[j] else ():
            if t == 6:
                continue
            new = oracle.adam(
                *(a[j] for a in want), 0.0, lr=rates[t - step - 1], step=t, betas=LEARNING["betas"]
            )
            for a, row in zip(want, new, strict=True):
                a[j] = row
            if normalize:
                want[0][j] /= np.linalg.norm(want[0][j])
    for mine, exact, old in zip(got, want, (w, m, v), strict=False):
        narrow_moment = bfloat16 and old is not w
        rtol = 2.0**-6 if narrow_moment else 1e-3 if bfloat16 else 1e-5
        np.testing.assert_allclose(to_float(mine), exact, rtol=rtol, atol=1e-3 if bfloat16 else 1e-6)
        stay = ~rows | (last_step >= step)
        np.testing.assert_array_equal(mine[stay], old[stay])
    np.testing.assert_array_equal(got[3], np.where(rows, np.maximum(last_step, step), last_step))


# ---- hot and empty features, unused slots, NaN, malformed codes ------------------------------------------------------


def hot_code(rng, n, d_sae, compressed=False) -> Code:
    """Feature 7 in every row; a few features share the rest; most are empty."""
    indices = np.stack([np.full(n, 7), rng.choice([0, d_sae // 2, d_sae - 1], n)], axis=1).astype(np.uint32)
    values = rng.standard_normal((n, 2)).astype(np.float32)
    if compressed:
        return Code(
            values.reshape(-1), indices.reshape(-1), np.arange(0, 2 * n + 1, 2, dtype=np.int64), "float"
        )
    return Code(values, indices, None, "float")


@pytest.mark.parametrize(
    ("n", "d_sae", "compressed"), [(1100, 300, False), (1030, 66000, True), (1030, 20, True)]
)
def test_entries_are_sorted_by_feature_and_row(n, d_sae, compressed):
    """Two tiles of entries, one to three passes; NaN and values > 0 take part, the order is that of a stable sort."""
    rng = np.random.default_rng(d_sae)
    code = hot_code(rng, n, d_sae, compressed)
    t = Training(*([None] * 5))._replace(x=np.zeros((n, 4), np.float32), terms=[Term(None, code, 1.0)], params=[None, None, np.zeros((d_sae, 4))])  # fmt: skip
    for firing in (False, True):
        if firing:
            sizes = update_sizes(
                t, project=True, normalize=True, through_input=False, clip_norm=0, shadow=False
            )
            plan = run_plan.plan("feature_update", **sizes)
            walk = next(i for i, s in enumerate(plan["steps"]) if s["kernel"].startswith("feature_update"))
            slots = (3, 4, 5)
        else:
            sizes = code.sizes() | dict(d=4, d_sae=d_sae, rows="float", aligned=True)
            plan = run_plan.plan("sparse_outer", **sizes)
            walk, slots = len(plan["steps"]) - 1, (1, 2, 3)
        bound = {index: buffer for index, buffer, *_ in plan["steps"][walk]["bindings"]}
        steps = [s for s in plan["steps"][:walk] if s["library"] == "code_sort"]
        inputs = [
            np.zeros(b["size"], run_plan.DTYPES[b["type"]]) for b in plan["buffers"] if b["role"] == "input"
        ]
        named = [b["name"] for b in plan["buffers"] if b["role"] == "input"]
        for name, array in zip(("values", "indices", "offsets"), [*code.arrays, *code.tail], strict=False):
            inputs[named.index(name)] = array
        kept: dict[str, np.ndarray] = {}
        run_plan.run_in_every_schedule(plan | {"steps": steps}, inputs, temporaries=kept)
        starts, rows, values = (kept[plan["buffers"][bound[i]]["name"]] for i in slots)

        v, i = code.values.reshape(-1), code.indices.reshape(-1)
        used = v > 0 if firing else v != 0
        order = np.argsort(i[used], kind="stable")
        np.testing.assert_array_equal(starts, np.searchsorted(i[used][order], np.arange(d_sae + 1)))
        np.testing.assert_array_equal(rows[: used.sum()], (np.flatnonzero(used) // 2)[order])
        np.testing.assert_array_equal(values[: used.sum()], v[used][order])


def test_hot_and_empty_features():
    rng = np.random.default_rng(1)
    n, d, d_sae = 300, 8, 40
    code = hot_code(rng, n, d_sae)
    rows = random_array(rng, (n, d))
    close(sparse_outer(code, rows, "float", d_sae), oracle.sparse_outer(code.values, code.indices, rows, d_sae), "float")  # fmt: skip
    t = training(rng, n, d, d, d_sae, 1)
    check_update(t._replace(terms=[Term(t.terms[0].residual, code, 2 / n)]), {}, clip_norm=0.5)


def test_a_code_without_entries():
    rng = np.random.default_rng(2)
    empty = Code(np.zeros(0, np.float32), np.zeros(0, np.uint32), np.zeros(4, np.int64), "float")
    w, x = random_array(rng, (9, 12)), random_array(rng, (3, 12))
    np.testing.assert_array_equal(sparse_outer(empty, x, "float", 9), 0)
    np.testing.assert_array_equal(sparse_decode(empty, w, "float"), 0)
    np.testing.assert_array_equal(
        tokens_since_fired(np.arange(9, dtype=np.int32), empty, 3), np.arange(9) + 3
    )
    t = training(rng, 3, 12, 12, 9, 1)
    check_update(t._replace(terms=[t.terms[0]._replace(code=empty)]), {})


def test_unused_slots_are_inert():
    """A value of 0, of either sign, adds nothing, whatever its row holds."""
    w = np.float32([[np.nan, np.inf], [1.0, 2.0], [np.inf, 5.0]])
    code = Code(np.float32([[0.0, 3.0, -0.0]]), np.uint32([[0, 1, 2]]), None, "float")
    np.testing.assert_array_equal(sparse_decode(code, w, "float"), [3.0, 6.0])
    outer = sparse_outer(code, np.float32([[1.0, np.inf]]), "float", 3)
    np.testing.assert_array_equal(outer, [0, 0, 3, np.inf, 0, 0])


def test_nan_is_seen():
    code = Code(np.float32([[np.nan, 1.0]]), np.uint32([[0, 1]]), None, "float")
    assert np.isnan(sparse_decode(code, np.ones((2, 4), np.float32), "float")).all()
    outer = sparse_outer(code, np.ones((1, 4), np.float32), "float", 3).reshape(3, 4)
    assert np.isnan(outer[0]).all()
    np.testing.assert_array_equal(outer[1:], [[1] * 4, [0] * 4])
    t = training(np.random.default_rng(0), 1, 4, 4, 3, 2)
    got = feature_update(t._replace(terms=[t.terms[0]._replace(code=code)]))
    assert np.isnan(got[3])
    assert np.isnan(got[0][2][0]).all()


def test_an_index_that_names_no_feature_reads_nothing_and_shows_as_nan():
    code = Code(np.ones((2, 2), np.float32), np.uint32([[0, 1], [2, 2**32 - 1]]), None, "float")
    w = np.ones((2, 8), np.float32)
    got = sparse_decode(code, w, "float").reshape(2, 8)
    np.testing.assert_array_equal(got[0], 2)
    assert np.isnan(got[1]).all()
    dots = gather_dot(np.ones((2, 8), np.float32), "float", w, "float", code)
    np.testing.assert_array_equal(dots, [8, 8, np.nan, np.nan])
    np.testing.assert_array_equal(sparse_outer(code, w, "float", 2), 1)
    np.testing.assert_array_equal(tokens_since_fired(np.int32([5, 5]), code, 2), 0)


@pytest.mark.parametrize("offsets", [[3, 1, 4, 2], [0, 2**40, -5, 7], [0, 0, 0, -1]])
def test_offsets_that_do_not_ascend_lead_nowhere(offsets):
    """Nothing is read or written out of bounds; what comes out is anybody's guess. (Rows that overlap race for their dots.)"""
    rng = np.random.default_rng(0)
    code = Code(random_array(rng, 4), rng.integers(0, 5, 4).astype(np.uint32), np.int64(offsets), "float")
    w, x = random_array(rng, (5, 8)), random_array(rng, (3, 8))
    sparse_decode(code, w, "float")
    with contextlib.suppress(msl.DataRace):
        gather_dot(x, "float", w, "float", code)
    sparse_outer(code, x, "float", 5)
    tokens_since_fired(np.zeros(5, np.int32), code, 3)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
@pytest.mark.parametrize("donate", [False, True])
def test_a_loss_that_is_not_finite_changes_nothing(loss, donate):
    t = training(np.random.default_rng(0), 8, 6, 6, 20, 3)
    t = t._replace(x=t.x * np.nan)
    for clip in (0.0, 1.0):
        got = feature_update(t, loss=loss, donate=donate, clip_norm=clip)
        for mine, old in zip(got[:3], (t.params, t.m, t.v), strict=True):
            for a, b in zip(mine, old, strict=True):
                np.testing.assert_array_equal(a, b)
        assert np.isnan(got[3])


def test_the_same_bits_whether_outputs_take_the_memory_of_inputs():
    t = training(np.random.default_rng(3), 20, 140, 140, 70, 6, 2)
    apart, inside = (
        feature_update(t, through_input=True, clip_norm=0.5, shadow=True, donate=d) for d in (False, True)
    )
    for a, b in zip(apart, inside, strict=True):
        for p, q in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
            np.testing.assert_array_equal(p, q)


# ---- counted work ----------------------------------------------------------------------------------------------------


def work(op, inputs, sizes) -> dict[str, msl.Counts]:
    return run_plan.counted(run_plan.plan(op, **sizes), inputs)


def of_buffers(counts: msl.Counts, names: tuple[str, ...]) -> msl.Counts:
    return replace(counts, buffers={n: t for n, t in counts.buffers.items() if n in names})


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("d", [256, 1024])
def test_products_move_little_more_than_they_must_in_whole_lines(d, type):
    """decode, gather-dot and outer product: the bytes that simdgroups ask for, and the share of the lines' bytes they take."""
    rng = np.random.default_rng(0)
    n, d_sae, k, item = 16, 128, 32, 4 if type == "float" else 2
    code = random_code(rng, n, d_sae, k, type)
    used = int((to_float(code.values) != 0).sum())
    w, rows = random_array(rng, (d_sae, d), type), random_array(rng, (n, d), type)
    codes = n * k * (4 + item)
    common = dict(d=d, d_sae=d_sae, aligned=True)

    sizes = code.sizes() | common | dict(w=type, bias=0, bias_type="float")
    (counts,) = work("sparse_decode", [*code.arrays, w], sizes).values()
    assert counts.bytes <= 1.25 * (item * d * (used + n) + codes)
    assert counts.efficiency >= 0.9

    sizes = code.sizes() | common | dict(rows=type, w=type)
    (counts,) = work("gather_dot", [rows, w, code.indices], sizes).values()
    assert counts.bytes - counts.buffers["rows"].bytes <= 1.25 * (item * d * n * k + codes)
    assert counts.buffers["rows"].bytes == item * d * n * k / 4  # a piece of a row serves four slots
    assert counts.efficiency >= 0.9

    counts = work("sparse_outer", [*code.arrays, rows], code.sizes() | common | dict(rows=type))[
        f"sparse_outer_{type}_4"
    ]
    assert counts.buffers["out"].bytes == item * d * d_sae
    assert counts.buffers["rows"].bytes == item * d * used
    assert counts.efficiency >= 0.9

    if type == "float":
        target = random_array(rng, (n, d))
        sizes = code.sizes() | common | dict(bias=0)
        (counts,) = work("decode_residual", [*code.arrays, w, target], sizes).values()
        assert counts.bytes <= 1.25 * (4 * d * (used + 2 * n) + codes)
        assert counts.efficiency >= 0.9

        (counts,) = work("encoder_shadow", [w], dict(d_sae=d_sae, d=d, aligned=True)).values()
        assert counts.bytes <= 1.25 * (4 + 2) * d * d_sae
        assert counts.efficiency >= 0.9


@pytest.mark.parametrize(
    ("d", "d_sae", "clip", "moment"),
    [(256, 1024, 0.0, 4), (1024, 256, 0.0, 4), (256, 1024, 1.0, 4), (256, 1024, 0.0, 2)],
)
def test_the_update_reads_and_writes_parameters_and_moments_once(d, d_sae, clip, moment):
    """All kernels of the op together, but for the gathers of x and residual, which come through the cache.

    With clipping the gradients are needed before anything may change: one more reading of the touched rows' weights.
    """
    rng = np.random.default_rng(0)
    n, k = 32, 16
    t = training(rng, n, d, d, d_sae, k)
    t = t if moment == 4 else narrow(t)
    options = dict(project=True, normalize=True, through_input=True, clip_norm=clip, shadow=False)
    found = work("feature_update", update_inputs(t, 1.0, False), update_sizes(t, **options))
    gathered = ("x", "residual", "residual_aux")
    total = sum(
        c.bytes - (of_buffers(c, gathered).bytes if name.startswith("feature_update") else 0)
        for name, c in found.items()
    )
    weights = (16 + 8 * moment) * d_sae * d
    least = weights + 8 * n * k + 4 * n * d
    again = 8 * d_sae * d if clip else 0
    assert total <= 1.25 * (least + again)

    walk = next(c for name, c in found.items() if name.startswith("feature_update"))
    once = of_buffers(walk, ("w_enc_out", "m_enc_out", "v_enc_out", "w_dec_out", "m_dec_out", "v_dec_out"))
    moments = of_buffers(walk, ("m_enc", "v_enc", "m_dec", "v_dec"))
    assert once.bytes == (8 + 4 * moment) * d_sae * d
    assert moments.bytes == 4 * moment * d_sae * d
    assert of_buffers(walk, ("w_enc", "w_dec")).bytes <= 8 * d_sae * d + again
    assert walk.efficiency >= 0.9
    assert all(c.atomics == 0 for name, c in found.items() if not name.startswith("code_"))


def test_bookkeeping_moves_little_more_than_it_must():
    rng = np.random.default_rng(0)
    n, k, d_sae = 64, 16, 4096
    code = random_code(rng, n, d_sae, k)
    sizes = code.sizes() | dict(d_sae=d_sae, n_tokens=n)
    found = work("tokens_since_fired", [np.zeros(d_sae, np.int32), *code.arrays], sizes)
    fired = int((code.values > 0).sum())
    assert sum(c.bytes for c in found.values()) <= 1.25 * (8 * d_sae + 8 * n * k + 4 * fired)
    assert found["tokens_age"].efficiency >= 0.9


# ---- what Apple's compiler would refuse; barriers ---------------------------------------------------------------------

LIBRARIES = (
    "adam_catch_up", "code_sort", "encoder_shadow", "feature_update", "gather_dot", "sparse_decode", "sparse_outer", "tokens_since_fired",
)  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_sources_are_clean(library):
    path = run_plan.METAL / f"{library}.metal"
    assert msl.lint(path, include=[run_plan.METAL]) == []
    try:
        msl.strict(path, include=[run_plan.METAL])
    except msl.ToolMissing as missing:
        pytest.skip(str(missing))


def without_barrier(library, check):
    """The mutants of a library's source that `check(libraries)` accepts."""
    path = run_plan.METAL / f"{library}.metal"
    return msl.survivors(path, lambda lib: check({library: lib}), include=[run_plan.METAL])


@pytest.mark.slow
def test_every_barrier_is_needed():
    """A source without one of its barriers is a race, or gives another result."""
    rng = np.random.default_rng(0)
    w, x = random_array(rng, (9, 301)), random_array(rng, (4, 301))
    few = random_code(rng, 4, 9, 3)
    assert not without_barrier("sparse_decode", lambda libs: decode_residual(few, w, x, libraries=libs))

    code, rows = random_code(rng, 80, 40, 20), random_array(rng, (80, 4))
    assert not without_barrier(
        "code_sort", lambda libs: sparse_outer(code, rows, "float", 40, libraries=libs)
    )

    short, long = (training(rng, 4, d, d, 9, 3) for d in (301, 2051))

    def update(libs):
        feature_update(short, libraries=libs)
        feature_update(long, libraries=libs)

    assert not without_barrier("feature_update", update)

    wide = [random_array(rng, (3, 301)) ** 2 for _ in range(3)]
    rows = np.int32([0, 1, 0]), np.ones(3, bool), [0.1, 0.1, 0.1], 3
    assert not without_barrier(
        "adam_catch_up", lambda libs: catch_up(*wide, *rows, donate=True, libraries=libs)
    )


# ---- from arrays to plans --------------------------------------------------------------------------------------------


def mlx(a: np.ndarray, type: str = "float") -> mx.array:
    return mx.array(a).view(mx.bfloat16) if type == "bfloat" else mx.array(a)


def plan_of(result: mx.array) -> dict[str, Any]:
    return json.loads(_ext.gpu_plan_of(result, gpu="applegpu_g14s"))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("value_type", "type"), [("float", "float"), ("half", "half"), ("half", "bfloat")])
@pytest.mark.parametrize("d", [48, 33])
def test_an_op_plans_what_is_tested_here(d, value_type, type, compressed):
    """The plan that an op makes from its arrays is the one that the other tests execute."""
    rng = np.random.default_rng(0)
    n, d_sae, k = 6, 20, 3
    code = random_code(rng, n, d_sae, k, value_type, compressed)
    values, indices = mlx(code.values, value_type), mx.array(code.indices)
    offsets = mx.array(code.offsets) if compressed else None
    w, rows = random_array(rng, (d_sae, d), type), random_array(rng, (n, d), type)
    left, bias = random_array(rng, (n, d), value_type), random_array(rng, d, value_type)
    common = code.sizes() | dict(d=d, d_sae=d_sae)
    same = run_plan.plan

    for b in (None, bias):
        got = _ext.sparse_decode(
            values, indices, mlx(w, type), None if b is None else mlx(b, value_type), offsets=offsets
        )
        sizes = common | dict(w=type, bias=b is not None, bias_type=value_type)
        assert plan_of(got) == same("sparse_decode", **sizes, aligned=aligned(w, *([] if b is None else [b])))
    got = _ext.gather_dot(mlx(left, value_type), mlx(w, type), indices, offsets=offsets)
    assert plan_of(got) == same("gather_dot", **common, rows=value_type, w=type, aligned=aligned(left, w))
    got = _ext.sparse_outer(values, indices, mlx(rows, type), d_sae=d_sae, offsets=offsets)
    assert plan_of(got) == same("sparse_outer", **common, rows=type, aligned=aligned(rows))
    counts = mx.zeros(d_sae, mx.int32)
    got = _ext.tokens_since_fired(counts, values, indices, n_tokens=n, offsets=offsets)
    assert plan_of(got) == same("tokens_since_fired", **common, n_tokens=n)
    if (value_type, type) == ("float", "float"):
        for b in (None, bias):
            got = _ext.decode_residual(
                values, indices, mlx(w), mlx(rows), None if b is None else mlx(b), offsets=offsets
            )
            assert plan_of(got[1]) == same(
                "decode_residual", **common, bias=b is not None, aligned=aligned(w)
            )
        assert plan_of(_ext.encoder_shadow(mlx(w), dtype=mx.bfloat16)[0]) == same(
            "encoder_shadow", d=d, d_sae=d_sae, aligned=aligned(w)
        )


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("d", "n_terms", "clip", "shadow", "bfloat16"),
    [
        (48, 1, 0.0, False, False),
        (33, 2, 0.5, True, False),
        (48, 3, 0.5, True, True),
        (44, 1, 0.0, False, True),
    ],
)
def test_the_update_plans_what_is_tested_here(d, n_terms, clip, shadow, bfloat16, compressed):
    t = training(np.random.default_rng(0), 6, d, d, 20, 3, n_terms, compressed)
    t = narrow(t) if bfloat16 else t
    terms = [
        ops.Term(mlx(q.residual), SparseCodeCSR(*map(mx.array, (*q.code.arrays, *q.code.tail))) if compressed else SparseCode(*map(mx.array, q.code.arrays)), mx.array(q.scale))
        for q in t.terms
    ]  # fmt: skip
    params, m, v = (
        ops.Params(*(mlx(a, "bfloat" if a.dtype == np.uint16 else "float") for a in four))
        for four in (t.params, t.m, t.v)
    )
    pair = (mx.zeros((20, d), mx.bfloat16), mx.zeros((3, 20))) if shadow else None
    learning = dict(lr=LEARNING["lr"], step=LEARNING["step"])
    out = ops.feature_update(
        mlx(t.x),
        terms,
        params,
        m,
        v,
        loss=mx.array(1.0),
        clip_norm=clip,
        b_dec_to_input=True,
        shadow=pair,
        **learning,
    )
    sizes = update_sizes(t, project=True, normalize=True, through_input=True, clip_norm=clip, shadow=shadow)
    if shadow:
        sizes["aligned"] = aligned(t.x, np.zeros((1, d), np.float16))
    got, want = plan_of(out[3]), run_plan.plan("feature_update", **sizes)
    for step, other in zip(got["steps"], want["steps"], strict=True):
        mine, theirs = (s.pop("arguments") for s in (step, other))
        for a, b in zip(mine, theirs, strict=True):
            assert a[:2] == b[:2]
            np.testing.assert_allclose(a[2], b[2], rtol=1e-5)  # float32 powers, and ours in float64
    assert got == want


@pytest.mark.parametrize("untouched", ["step", "keep_decoder", "keep"])
def test_the_untouched_rows_of_a_plan(untouched):
    t = training(np.random.default_rng(0), 6, 8, 8, 20, 3)
    terms = [
        ops.Term(mlx(q.residual), SparseCode(*map(mx.array, q.code.arrays)), mx.array(q.scale))
        for q in t.terms
    ]
    four = (ops.Params(*map(mlx, p)) for p in (t.params, t.m, t.v))
    out = ops.feature_update(mlx(t.x), terms, *four, loss=mx.array(1.0), lr=1.0, step=1, untouched=untouched)
    sizes = update_sizes(t, project=True, normalize=True, through_input=False, clip_norm=0, shadow=False, untouched=untouched)  # fmt: skip
    flags = [
        {s["kernel"]: s["arguments"] for s in plan["steps"]} for plan in (plan_of(out[3]), run_plan.plan("feature_update", **sizes))
    ]  # fmt: skip
    for kernel in ("feature_update_simdgroup_float_4", "step_b_enc"):
        assert flags[0][kernel] == flags[1][kernel]


@pytest.mark.parametrize(("d", "bfloat16"), [(48, False), (33, True), (44, True)])
def test_the_catch_up_plans_what_is_tested_here(d, bfloat16):
    w = mx.zeros((5, d))
    m = w.astype(mx.bfloat16) if bfloat16 else w
    out = ops.adam_catch_up(w, m, m, mx.zeros(5, mx.int32), mx.ones(5, mx.bool_), step=2, lr=[0.1, 0.2])
    of = np.zeros((5, d), np.uint16 if bfloat16 else np.float32)
    sizes = dict(
        d_sae=5, d=d, steps=2, moments="bfloat" if bfloat16 else "float", aligned=aligned(np.zeros((5, d), np.float32), of),
        beta1=0.9, beta2=0.999, eps=1e-8, step=2, normalize=True,
    )  # fmt: skip
    assert plan_of(out[0]) == run_plan.plan("adam_catch_up", **sizes)


def test_a_view_that_is_not_aligned_takes_the_narrow_kernel():
    w = mx.zeros((21, 32)).reshape(-1)[1 : 1 + 20 * 32].reshape(20, 32)
    mx.eval(w)
    code = mx.ones((2, 2)), mx.zeros((2, 2), mx.uint32)
    kernels = [
        plan_of(_ext.sparse_decode(*code, a, None))["steps"][0]["kernel"] for a in (w, mx.zeros((20, 32)))
    ]
    assert kernels == ["sparse_decode_float_1", "sparse_decode_float_4"]


def test_only_results_of_ops_have_plans():
    with pytest.raises(ValueError, match=r"\[gpu_plan_of\] result must come straight from an op"):
        _ext.gpu_plan_of(mx.zeros(3))
