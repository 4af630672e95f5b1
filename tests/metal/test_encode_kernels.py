"""The encoders on Metal: whole plans on the harness, against the float64 definitions and, bit for bit, against the CPU kernels."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import mlx.core as mx
import msl
import numpy as np
import pytest
import run_plan

import mlxsae
import oracle
from mlxsae import _ext

SIZES = (1, 31, 32, 33, 48, 1000)
TYPES = ("float", "half", "bfloat")
EVERY = run_plan.run_in_every_schedule
SMALL_CHUNKS = 1  # bytes: chunks are as small as they can be, 1024 features


@dataclasses.dataclass
class Case:
    """Operands of an encoder, as the kernels get them."""

    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    type: str = "float"

    @staticmethod
    def random(n: int, d_in: int, d_sae: int, type: str = "float", seed: int = 0) -> Case:
        rng = np.random.default_rng([n, d_in, d_sae, seed])
        x, w = rng.standard_normal((n, d_in)), rng.standard_normal((d_sae, d_in))
        return Case.of(x, w, 0.1 * rng.standard_normal(d_sae), type)

    @staticmethod
    def of(x: Any, w: Any, b: Any, type: str = "float") -> Case:
        x, w, b = (np.asarray(a, np.float32) for a in (x, w, b))
        return Case(run_plan.from_float(x, type), run_plan.from_float(w, type), b, type)

    @property
    def floats(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return run_plan.to_float(self.x), run_plan.to_float(self.w), self.b

    def plan(
        self, op: str, *, exact: bool = True, shadow: bool = False, gpu: str = "applegpu_g14s", **sizes: int
    ) -> dict:
        (n, d_in), d_sae = self.x.shape, len(self.w)
        aligned = d_in * self.x.itemsize % 16 == 0
        flags = {"exact": exact, "shadow": shadow, "aligned": aligned, "aligned_bias": True}
        return run_plan.plan(op, gpu=gpu, n=n, d_in=d_in, d_sae=d_sae, type=self.type, **flags, **sizes)

    def topk(
        self,
        k: int,
        *,
        mask: np.ndarray | None = None,
        k_aux: int = 0,
        shadow=None,
        run=run_plan.run,
        **options: Any,
    ):
        """(values, indices) of each selection by the plan."""
        sizes = {s: options.pop(s) for s in ("exact", "gpu", "chunk_bytes", "simdgroups") if s in options}
        plan = self.plan("topk_encode", k=k, k_aux=k_aux, shadow=shadow is not None, **sizes)
        inputs = [self.x, self.w, self.b, *([] if mask is None else [mask]), *(shadow or [])]
        out = run(plan, inputs, **options)
        return [
            (run_plan.to_float(out[i]).reshape(-1, width), out[i + 1].reshape(-1, width))
            for i, width in ((0, k), (2, k_aux))[: len(out) // 2]
        ]

    def csr(self, op: str, rule: np.ndarray, *, size: int, shadow=None, run=run_plan.run, **options: Any):
        """(values, indices, offsets, number) by the plan."""
        sizes = {s: options.pop(s) for s in ("exact", "gpu", "chunk_bytes", "simdgroups") if s in options}
        name = "k" if op == "batch_topk_encode" else "capacity"
        plan = self.plan(op, shadow=shadow is not None, **{name: size}, **sizes)
        out = run(plan, [self.x, self.w, self.b, rule, *(shadow or [])], **options)
        return run_plan.to_float(out[0]), out[1], out[2], out[3][0]

    # The same by the CPU kernels, on the operands as float32.

    def topk_on_cpu(self, k: int, mask: np.ndarray | None = None, k_aux: int = 0):
        x, w, b = map(mx.array, self.floats)
        if mask is None:
            out = list(_ext.topk_encode(x, w, b, k=k, stream=mx.cpu))
        else:
            out = _ext.topk_encode_masked(x, w, b, mx.array(mask), k=k, k_aux=k_aux, stream=mx.cpu)
        return [(self.rounded(out[i]), np.array(out[i + 1])) for i in range(0, len(out), 2)]

    def csr_on_cpu(self, op: str, rule: np.ndarray, size: int):
        x, w, b = map(mx.array, self.floats)
        if op == "batch_topk_encode":
            out = _ext.batch_topk_encode(x, w, b, k=size, stream=mx.cpu)
        else:
            out = _ext.threshold_encode(x, w, b, mx.array(rule), capacity=size, stream=mx.cpu)
        return self.rounded(out[0]), *(np.array(a) for a in out[1:])

    def rounded(self, values: mx.array) -> np.ndarray:
        return run_plan.to_float(run_plan.from_float(np.array(values), self.type))


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def same_codes(ours: list, theirs: list) -> None:
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)


def shadow_of(w: np.ndarray) -> list[np.ndarray]:
    w16, columns = _ext.encoder_shadow(mx.array(w), dtype=mx.bfloat16, stream=mx.cpu)
    return [np.array(w16.view(mx.uint16)), np.array(columns)]


def truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A product whose operands lose all but 10 bits of their fractions, as tf32 hardware may treat them."""
    cut = [(v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (a, b)]
    return run_plan.product(*cut)


def rule_for(op: str, case: Case) -> np.ndarray:
    if op == "batch_topk_encode":
        return np.zeros(1, np.float32)
    rng = np.random.default_rng(0)
    return (np.sqrt(case.x.shape[1]) * (0.8 + 0.4 * rng.random(len(case.w)))).astype(np.float32)


CSR = ("batch_topk_encode", "threshold_encode")


def test_a_named_tf32_product_decides_as_it_is() -> None:
    """tf32: the plan screens nothing, and the code is that of the product whose operands are cut, not the float32 one."""
    case = Case.random(9, 32, 1300)
    x, w, b = map(mx.array, (case.x, case.w, case.b))
    made = [
        _ext.topk_encode(x, w, b, k=8, tf32=True)[0],
        _ext.topk_encode_masked(x, w, b, mx.ones(1300, mx.bool_), k=8, k_aux=4, tf32=True)[0],
        _ext.batch_topk_encode(x, w, b, k=8, tf32=True)[0],
    ]
    for op, array in zip(("topk_encode", "topk_encode", "batch_topk_encode"), made, strict=True):
        k_aux = {"k_aux": 4 if array is made[1] else 0} if op == "topk_encode" else {}
        want = case.plan(op, exact=False, k=8, gpu="sm_90", **k_aux)
        assert json.loads(_ext.gpu_plan_of(array, gpu="sm_90")) == want
        assert want != case.plan(op, exact=True, k=8, gpu="sm_90", **k_aux)
    cut = [(a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for a in (case.x, case.w)]
    values, indices, _ = oracle.topk_encode(*cut, case.b, 8)
    ((got, places),) = case.topk(8, exact=False, gpu="sm_90", chunk_bytes=SMALL_CHUNKS, matmul=truncated)
    assert (places == indices).mean() > 0.99  # but for ties within the rounding of float32
    np.testing.assert_allclose(np.sort(got), np.sort(values), rtol=1e-5)
    ((exact, _),) = case.topk_on_cpu(8)
    assert not np.allclose(np.sort(got), np.sort(exact), rtol=1e-5)
    # On the CPU the name changes nothing.
    same(
        [np.array(a) for a in _ext.topk_encode(x, w, b, k=8, tf32=True, stream=mx.cpu)],
        [np.array(a) for a in _ext.topk_encode(x, w, b, k=8, stream=mx.cpu)],
    )
    with pytest.raises(ValueError, match=r"\[topk_encode\] shadow and tf32 must not both be given"):
        _ext.topk_encode(x, w, b, k=8, shadow=_ext.encoder_shadow(w), tf32=True)


# ---------------------------------------------------------------------------------------------- the float32 result


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [3, 9])
def test_every_encoder_gives_the_float32_result(type: str, size: int, n: int) -> None:
    for d_in, d_sae in ((size, 37), (24, size)):
        case, k = Case.random(n, d_in, d_sae, type), min(7, d_sae)
        for op, room in zip(CSR, (k, 9 * n), strict=True):
            rule = rule_for(op, case)
            same(case.csr(op, rule, size=room, run=EVERY), case.csr_on_cpu(op, rule, room))
        ours = case.topk(k, run=EVERY)
        same_codes(ours, case.topk_on_cpu(k))
        x, w, b = case.floats
        values, indices, z = oracle.topk_encode(x, w, b, k)
        assert oracle.same_selection(z, oracle.float32_error_bound(x, w, b), ours[0][1], k) == []
        if np.array_equal(indices, ours[0][1]):
            name = {"float": "float32", "half": "float16", "bfloat": "bfloat16"}[type]
            np.testing.assert_allclose(ours[0][0], values, rtol=oracle.RTOL[name], atol=1e-3)


@pytest.mark.parametrize("n", [2, 9])
def test_wide_rows_in_small_chunks(n: int) -> None:
    case = Case.random(n, 20, 3500)
    same_codes(case.topk(5, chunk_bytes=SMALL_CHUNKS), case.topk_on_cpu(5))
    for op, size in zip(CSR, (5, 100 * n), strict=True):
        rule = rule_for(op, case)
        same(case.csr(op, rule, size=size, chunk_bytes=SMALL_CHUNKS), case.csr_on_cpu(op, rule, size))


def test_rows_in_parts() -> None:
    case = Case.random(10, 12, 2500)
    for simdgroups in (10, 30):
        same_codes(case.topk(9, simdgroups=simdgroups), case.topk_on_cpu(9))
        for op, size in zip(CSR, (9, 2000), strict=True):
            rule = rule_for(op, case)
            same(case.csr(op, rule, size=size, simdgroups=simdgroups), case.csr_on_cpu(op, rule, size))


@pytest.mark.parametrize("n", [1, 9])
def test_second_selection_among_masked_features(n: int) -> None:
    case = Case.random(n, 33, 500)
    for share in (0.5, 0.01, 0.0):  # fewer masked than k_aux
        mask = np.random.default_rng(1).random(500) < share
        same_codes(case.topk(6, mask=mask, k_aux=40), case.topk_on_cpu(6, mask, 40))


def test_the_shadow_screens_in_bfloat16() -> None:
    for d_in in (32, 45):
        case = Case.random(12, d_in, 700)
        rule = np.zeros(1, np.float32)
        same(case.csr(CSR[0], rule, size=8, shadow=shadow_of(case.w)), case.csr_on_cpu(CSR[0], rule, 8))
        mask = np.random.default_rng(1).random(700) < 0.3
        same_codes(case.topk(8, shadow=shadow_of(case.w)), case.topk_on_cpu(8))
        same_codes(case.topk(8, shadow=shadow_of(case.w), mask=mask, k_aux=20), case.topk_on_cpu(8, mask, 20))


def test_a_product_that_rounds_its_operands_gives_the_same_bits() -> None:
    case = Case.random(12, 64, 700)
    same_codes(case.topk(8, gpu="applegpu_g17s", matmul=truncated), case.topk_on_cpu(8))
    for op, size in zip(CSR, (8, 900), strict=True):
        rule = rule_for(op, case)
        same(
            case.csr(op, rule, size=size, gpu="applegpu_g17s", matmul=truncated),
            case.csr_on_cpu(op, rule, size),
        )


# ------------------------------------------------------------------------------------------------ hostile operands


def hostile(n: int, d_sae: int) -> dict[str, Case]:
    d_in, rng = 8, np.random.default_rng(0)
    one = np.ones((n, d_in))
    up = np.linspace(0.1, 2, d_sae)[:, None] * np.ones(d_in)
    x = rng.standard_normal((n, d_in))
    w = rng.standard_normal((d_sae, d_in))
    none = np.zeros(d_sae)
    broken = x.copy()
    broken[0, 3], broken[min(1, n - 1), 2] = np.nan, np.inf
    bad_w = w.copy()
    bad_w[5], bad_w[7, 0], bad_w[9] = np.nan, -np.inf, 3e38
    cases = {
        "ascending": (one, up, none),  # every value is a candidate
        "descending": (one, up[::-1], none),
        "all equal": (one, np.ones((d_sae, d_in)), none),
        "equal features": (x, np.tile(w[:3], (d_sae, 1))[:d_sae], none),  # all intervals overlap
        "nearly equal": (one, 1 + 1e-7 * rng.standard_normal((d_sae, d_in)), none),
        "a step up": (one, np.where(np.arange(d_sae) < 5, 0.5, 1)[:, None] + 1e-7 * w, none),
        "all negative": (one, -up, none),
        "zero rows": (0 * x, w, 0.1 * rng.standard_normal(d_sae)),
        "zero rows, no bias": (0 * x, w, none),
        "tiny": (1e-22 * x, w, none),
        "huge": (1e25 * x, 1e15 * w, none),
        "NaN and inf in x": (broken, w, none),
        "NaN and inf in w": (x, bad_w, none),
        "NaN in b": (x, w, np.where(np.arange(d_sae) % 50 == 3, np.nan, 0.0)),
    }
    return {name: Case.of(*operands) for name, operands in cases.items()}


@pytest.mark.parametrize("name", hostile(2, 10))
@pytest.mark.parametrize("n", [2, 9])
def test_hostile_operands(name: str, n: int) -> None:
    case = hostile(n, 1100)[name]
    with np.errstate(all="ignore"):
        same_codes(case.topk(5, chunk_bytes=SMALL_CHUNKS), case.topk_on_cpu(5))
        for op, rule, size in zip(CSR, (np.zeros(1), np.ones(1100)), (5, 300 * n), strict=True):
            rule = rule.astype(np.float32)
            same(case.csr(op, rule, size=size, chunk_bytes=SMALL_CHUNKS), case.csr_on_cpu(op, rule, size))


def test_k_of_any_size() -> None:
    case = Case.random(9, 16, 600)
    for k in (300, 599, 600):
        same_codes(case.topk(k), case.topk_on_cpu(k))
        same(case.csr(CSR[0], np.zeros(1, np.float32), size=k), case.csr_on_cpu(CSR[0], np.zeros(1), k))


def test_room_for_less_than_there_is() -> None:
    case = Case.random(9, 16, 2100)
    rule = rule_for(CSR[1], case)
    for n_rows in (9, 2):
        some = Case(case.x[:n_rows], case.w, case.b)
        for capacity in (0, 1, 50, 10_000):
            same(
                some.csr(CSR[1], rule, size=capacity, chunk_bytes=SMALL_CHUNKS),
                some.csr_on_cpu(CSR[1], rule, capacity),
            )


def test_ties_go_to_the_lowest_row_then_feature_across_chunks() -> None:
    case = Case.of(np.ones((9, 4)), np.ones((2100, 4)), np.zeros(2100))
    got = case.csr(CSR[0], np.zeros(1, np.float32), size=300, chunk_bytes=SMALL_CHUNKS)
    assert got[2].tolist() == [0, 2100, *[2700] * 8]
    assert got[1].tolist() == [*range(2100), *range(600)]


def test_nothing_to_do() -> None:
    case = Case.random(0, 5, 7)
    assert [a.size for a in case.topk(3)[0]] == [0, 0]
    values, indices, offsets, number = case.csr(CSR[0], np.zeros(1, np.float32), size=3)
    assert (values.size, indices.size, offsets.tolist(), number) == (0, 0, [0], 0)
    values, indices, offsets, number = case.csr(CSR[1], np.zeros(7, np.float32), size=4)
    assert (values.tolist(), indices.tolist(), offsets.tolist(), number) == ([0] * 4, [0] * 4, [0], 0)


# ------------------------------------------------------------------------------------------------- the fast selection


def product_keys(case: Case) -> np.ndarray:
    """Pre-activations by the framework's product in the operands' type, as the fast path sees them."""
    z = run_plan.to_float(run_plan.product(case.x, case.w)) + case.b
    return np.where(np.isnan(z), np.inf, z)


@pytest.mark.parametrize("type", TYPES)
def test_fast_selection_is_that_of_the_product(type: str) -> None:
    case = Case.random(11, 40, 1300, type)
    z = product_keys(case)
    indices = np.sort(np.argsort(-z, axis=1, kind="stable")[:, :20], axis=1)
    values = np.maximum(np.take_along_axis(z, indices, 1), 0)
    ours = case.topk(20, exact=False, chunk_bytes=SMALL_CHUNKS)[0]
    same(ours, (run_plan.to_float(run_plan.from_float(values, type)), indices))

    kept = np.zeros(z.size, bool)
    kept[np.argsort(-np.maximum(z, 0), axis=None, kind="stable")[: 20 * 11]] = True
    values, indices, offsets = oracle.compressed(kept.reshape(z.shape) & (z > 0), z)
    got = case.csr(CSR[0], np.zeros(1, np.float32), size=20, exact=False, chunk_bytes=SMALL_CHUNKS)
    same(got[:3], (run_plan.to_float(run_plan.from_float(values, type)), indices, offsets))

    bounds = rule_for(CSR[1], case)
    values, indices, offsets = oracle.compressed(z > bounds, z)
    room = len(values)
    got = case.csr(CSR[1], bounds, size=room, exact=False, chunk_bytes=SMALL_CHUNKS)
    same(got, (run_plan.to_float(run_plan.from_float(values, type)), indices, offsets, room))


# ---------------------------------------------------------------------------------------- what the harness can prove


@pytest.mark.parametrize("n", [2, 9])
def test_no_race_in_any_schedule(n: int) -> None:
    """Of several chunks, all of whose values are candidates; and of rows in parts, with a shadow."""
    case = hostile(n, 1100)["ascending"]
    mask = np.arange(1100) % 3 == 0
    options: dict[str, Any] = {"run": EVERY, "chunk_bytes": SMALL_CHUNKS}
    same_codes(case.topk(6, mask=mask, k_aux=9, **options), case.topk_on_cpu(6, mask, 9))
    for op, size in zip(CSR, (6, 900), strict=True):
        rule = np.full(1 if op == CSR[0] else 1100, 4, np.float32)
        same(case.csr(op, rule, size=size, **options), case.csr_on_cpu(op, rule, size))

    case = Case.random(n, 32, 1100)
    options = {"run": EVERY, "simdgroups": 2 * n, "shadow": shadow_of(case.w) if n > 8 else None}
    same_codes(case.topk(6, **options), case.topk_on_cpu(6))
    same(
        case.csr(CSR[0], np.zeros(1, np.float32), size=6, **options), case.csr_on_cpu(CSR[0], np.zeros(1), 6)
    )


@pytest.mark.slow
@pytest.mark.parametrize("library", ["encode_products", "topk_encode", "csr_encode"])
def test_every_barrier_is_needed(library: str) -> None:
    """Without any one of its barriers a kernel fails in checked mode, or gives another result."""
    cases = [hostile(9, 1100)["a step up"], Case.random(9, 20, 1100)]
    few = Case.random(2, 70, 100)
    mask = np.arange(1100) % 100 == 0  # fewer than k_aux
    selected = [case.topk_on_cpu(40, mask, 20) for case in cases]
    batch = [case.csr_on_cpu(CSR[0], np.zeros(1), 20) for case in cases]
    no_rule = np.zeros(1, np.float32)
    plans = [p for c in cases for p in (c.plan("topk_encode", k=40, k_aux=20), c.plan(CSR[0], k=20))]
    plans.append(few.plan("topk_encode", k=4, k_aux=0))
    kernels = {s["kernel"] for p in plans for s in p["steps"] if s.get("library") == library}

    def check(mutant: msl.Library) -> None:
        for schedule in (0, 2, 3, 4):  # what is atomic is no race, but goes wrong in some order
            options: dict[str, Any] = {"libraries": {library: mutant}, "schedule": schedule}
            if library != "csr_encode":
                same_codes(few.topk(4, **options), few.topk_on_cpu(4))
                for case, want in zip(cases, selected, strict=True):
                    same_codes(case.topk(40, mask=mask, k_aux=20, **options), want)
            if library != "topk_encode":
                for case, want in zip(cases, batch, strict=True):
                    same(case.csr(CSR[0], no_rule, size=20, **options), want)

    path = run_plan.METAL / f"{library}.metal"
    alive = msl.survivors(path, check, kernels=sorted(kernels), include=[run_plan.METAL])
    assert not alive, "\n".join(map(str, alive))


@pytest.mark.parametrize("library", ["encode_products", "topk_encode", "csr_encode"])
def test_what_apples_compiler_would_refuse(library: str) -> None:
    path = run_plan.METAL / f"{library}.metal"
    assert msl.lint(path, include=[run_plan.METAL]) == []
    try:
        msl.strict(path, include=[run_plan.METAL])
    except msl.ToolMissing as e:
        pytest.skip(str(e))


def test_counted_work() -> None:
    """Coalescing of what is bound by bandwidth; and the filter reads the product once."""
    for n, type in ((2, "float"), (2, "bfloat"), (32, "float"), (32, "bfloat")):
        case = Case.random(n, 256, 2048, type)
        bounds = np.full(2048, 40, np.float32)
        for op, rule, sizes in (
            ("topk_encode", [], {"k": 16, "k_aux": 0}),
            (CSR[0], [np.zeros(1, np.float32)], {"k": 16}),
            (CSR[1], [bounds], {"capacity": 2000}),
        ):
            plan = case.plan(op, **sizes)
            counts = run_plan.counted(plan, [case.x, case.w, case.b, *rule])
            for kernel, c in counts.items():
                if kernel.startswith(("topk_filter", "csr_filter")):
                    product = c.buffers["product"]
                    item = 2 if n > 8 and type == "bfloat" else 4
                    assert product.read_bytes == n * 2048 * item, kernel
                    assert product.efficiency >= 0.9, (kernel, product)
                elif kernel.startswith(("encode_rows", "encode_columns", "encode_chain")):
                    name = "x" if kernel.startswith("encode_rows") else "w"
                    weights = c.buffers[name]
                    assert weights.read_bytes == (n if name == "x" else 2048) * 256 * case.x.itemsize, kernel
                    assert weights.efficiency >= 0.9, (kernel, weights)


def test_our_ops_describe_these_plans() -> None:
    """Every op with a plan names libraries that are there, and no build without GPU claims a kernel."""
    for op in ("topk_encode", *CSR):
        assert _ext.kernel_for(op, mx.Device(mx.gpu, 0)) == "fallback" or mx.metal.is_available()
    with pytest.raises(ValueError, match=r"\[gpu_plan\] op must have a plan but no_such_op has none."):
        run_plan.plan("no_such_op")
    with pytest.raises(ValueError, match=r"\[gpu_plan\] sizes must hold n but do not."):
        run_plan.plan("topk_encode")
    assert mlxsae.backends()["topk_encode"]["cpu"].startswith("kernel")
