"""The harness runs the language: vectors, types, simd operations, atomics, matrices, constants, grids."""

from __future__ import annotations

import msl
import numpy as np
import pytest

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
LANES = np.arange(32)


@pytest.fixture(scope="module", params=["fast", "checked"])
def load(request, compiler):
    return lambda text, **options: msl.load(HEAD + text, mode=request.param, compiler=compiler, **options)


VECTORS = """
struct Packed { packed_float3 p; half h; };
static_assert(sizeof(float3) == 16 && alignof(float3) == 16 && sizeof(packed_float3) == 12 && sizeof(half4) == 8, "layout");
static_assert(sizeof(Packed) == 16 && sizeof(bfloat) == 2 && sizeof(long) == 8, "layout");
constant float table[3] = {1.0, 2.0, 4.0};
constant constexpr uint WIDTH = 4;

kernel void vectors(device float* o, const device float4* x, uint i [[thread_position_in_grid]]) {
  device float* r = o + i * 24;
  float4 v = x[i];
  r[0] = v.y + v.w; r[1] = v.wzyx.x; r[2] = v.xxyy.w; r[3] = v[2];
  v.xz = v.zx;                      r[4] = v.x; r[5] = v.z;
  v.zw += float2(1.0);              r[6] = v.z; r[7] = v.w;
  float4 w = float4(v.xy, float2(7.0, 8.0)); r[8] = w.w - w.z;
  bool4 m = w > float4(1.5);        r[9] = any(m) + 2 * all(m);
  w = select(w, w * 2.0, m);        r[10] = w.w; r[11] = dot(w.zw, float2(1.0, 0.5));
  int3 n = int3(w.zwz) / 3;         r[12] = n.x; r[13] = (n.xyz << 1).y;
  Packed p; p.p = packed_float3(w.xyz); p.h = half(v.y) * 3.0h;
  r[14] = p.p[2]; r[15] = float(p.h); r[16] = float3(p.p).y;
  r[17] = table[i % 3] * WIDTH; r[18] = as_type<float>(as_type<uint>(v.x) ^ 0x80000000u);
  r[19] = clamp(v, 0.0, 1.0).x; r[20] = max(v, float4(3.0)).y; r[21] = length(float2(3.0, 4.0)); r[22] = 1 / 2.0;
  r[23] = float(uchar(250) + uchar(10)) + metal::min(3u, 4u);
}
"""


def test_vectors_swizzles_packed_types_and_literals(load):
    x = np.random.default_rng(0).uniform(-2, 2, (8, 4)).astype(np.float32)
    out = np.zeros((8, 24), np.float32)
    load(VECTORS).launch("vectors", {"o": out, "x": x}, grid=(8,), threadgroup=(8,))
    for i, row in enumerate(x):
        v = row.copy()
        e = [v[1] + v[3], v[3], v[1], v[2]]
        v[[0, 2]] = v[[2, 0]]
        e += [v[0], v[2]]
        v[2:] += 1
        e += [v[2], v[3]]
        w = np.array([v[0], v[1], 7, 8], np.float32)
        m = w > 1.5
        e += [1, m.any() + 2 * m.all()]
        w = np.where(m, w * 2, w)
        e += [w[3], w[2] + w[3] / 2, 14 // 3, (16 // 3) << 1, w[2], np.float16(v[1]) * np.float16(3), w[1]]
        e += [(1, 2, 4)[i % 3] * 4, -v[0], np.clip(v[0], 0, 1), max(v[1], 3), 5, 0.5, 263]
        np.testing.assert_allclose(out[i], np.array(e, np.float32), rtol=1e-6)


def test_every_swizzle_of_two_to_four_components(load):
    rng = np.random.default_rng(1)
    names = {"".join(rng.choice(list("xyzw"[:n]), k)) for n in (2, 3, 4) for k in (2, 3, 4) for _ in range(6)}
    names = sorted((n, w) for n in names for w in (2, 3, 4) if all(c in "xyzw"[:w] for c in n))
    text = "kernel void swizzles(device float* o, const device float* x) { uint k = 0;\n"
    for name, width in names:
        text += f"{{ float{width} v; for (int i = 0; i < {width}; ++i) v[i] = x[i]; float{len(name)} s = v.{name};"
        text += f" for (int i = 0; i < {len(name)}; ++i) o[k++] = s[i]; }}\n"
    expected = [("xyzw".index(c) + 1) for name, _ in names for c in name]
    out = np.zeros(len(expected), np.float32)
    load(text + "}").launch(
        "swizzles", {"o": out, "x": np.arange(1, 5, dtype=np.float32)}, grid=(1,), threadgroup=(1,)
    )
    assert out.tolist() == expected


def test_half_and_bfloat_round_as_ieee(load):
    text = """
kernel void types(const device float* x, device half* h, device bfloat* b, device float* back, uint i [[thread_position_in_grid]]) {
  h[i] = half(x[i]); b[i] = bfloat(x[i]); back[i] = float(b[i]) + float(h[i] * h[i]);
  bfloat twice = b[i]; twice += b[i]; if (float(twice) != 2 * float(b[i])) b[i] = bfloat(-1.0f);
}"""
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [rng.standard_normal(500), [0, -0.0, 1e-3, 1.00390625, 1.01171875, 200.5, 1e-6]]
    ).astype(np.float32)
    h, b, back = np.zeros(x.size, np.float16), np.zeros(x.size, np.uint16), np.zeros(x.size, np.float32)
    load(text).launch("types", {"x": x, "h": h, "b": b, "back": back}, grid=(x.size,), threadgroup=(64,))
    assert np.array_equal(h, x.astype(np.float16))
    assert np.array_equal(b, msl.bfloat16.pack(x))
    square = x.astype(np.float16) ** 2
    np.testing.assert_allclose(back, msl.bfloat16.unpack(b) + square.astype(np.float32), rtol=2e-3, atol=1e-6)


def test_bfloat_pack_rounds_to_even_and_keeps_nan():
    x = np.array([1.0, 1.00390625, 1.01171875, np.inf, np.nan, -3.3e38], np.float32)
    u = msl.bfloat16.unpack(msl.bfloat16.pack(x))
    assert u[:4].tolist() == [1.0, 1.0, 1.015625, np.inf]
    assert np.isnan(u[4])


SIMD = {
    "simd_sum(v)": lambda v: np.full(32, v.sum()),
    "simd_product(1 + v % 2)": lambda v: np.full(32, 2.0**16),
    "simd_max(v)": lambda v: np.full(32, v.max()),
    "simd_min(v)": lambda v: np.full(32, v.min()),
    "simd_or(v)": lambda v: np.full(32, np.bitwise_or.reduce(v)),
    "simd_and(v | 64)": lambda v: np.full(32, np.bitwise_and.reduce(v | 64)),
    "simd_xor(v)": lambda v: np.full(32, np.bitwise_xor.reduce(v)),
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v) - v,
    "simd_prefix_inclusive_sum(v)": np.cumsum,
    "simd_prefix_exclusive_product(1 + v % 2)": lambda v: np.cumprod(1 + v % 2) // (1 + v % 2),
    "simd_prefix_inclusive_product(1 + v % 2)": lambda v: np.cumprod(1 + v % 2),
    "simd_shuffle(v, 31 - lane)": lambda v: v[::-1],
    "simd_broadcast(v, 7)": lambda v: np.full(32, v[7]),
    "simd_broadcast_first(v)": lambda v: np.full(32, v[0]),
    "simd_shuffle_xor(v, 5)": lambda v: v[LANES ^ 5],
    "simd_shuffle_rotate_up(v, 3)": lambda v: v[(LANES - 3) % 32],
    "simd_shuffle_rotate_down(v, 3)": lambda v: v[(LANES + 3) % 32],
    "lane < 28 ? simd_shuffle_down(v, 4) : simd_shuffle_down(v, 4) * 0": lambda v: np.where(
        LANES < 28, np.roll(v, -4), 0
    ),
    "simd_shuffle_and_fill_up(v, v + 1000, 3)": lambda v: np.where(
        LANES < 3, v[(LANES - 3) % 32] + 1000, np.roll(v, 3)
    ),
    "simd_shuffle_and_fill_down(v, v + 1000, 3)": lambda v: np.where(
        LANES > 28, v[(LANES + 3) % 32] + 1000, np.roll(v, -3)
    ),
    "simd_shuffle_and_fill_up(v, v + 1000, 3, 8)": lambda v: np.where(
        LANES % 8 < 3, v[LANES // 8 * 8 + (LANES - 3) % 8] + 1000, v[(LANES - 3) % 32]
    ),
    "simd_shuffle_and_fill_down(v, v + 1000, 1, 4)": lambda v: np.where(
        LANES % 4 == 3, v[LANES // 4 * 4] + 1000, v[(LANES + 1) % 32]
    ),
    "simd_vote::vote_t(simd_ballot(v % 3 == 0))": lambda v: np.full(
        32, sum(1 << i for i in range(32) if v[i] % 3 == 0)
    ),
    "simd_any(v == 4)": lambda v: np.full(32, (v == 4).any()),
    "simd_all(v < 100)": lambda v: np.full(32, (v < 100).all()),
    "simd_is_first()": lambda v: LANES == 0,
    "simd_vote::vote_t(simd_active_threads_mask())": lambda v: np.full(32, 2**32 - 1),
    "quad_sum(v)": lambda v: np.repeat(v.reshape(8, 4).sum(1), 4),
    "quad_product(1 + v % 3)": lambda v: np.repeat((1 + v % 3).reshape(8, 4).prod(1), 4),
    "quad_max(v)": lambda v: np.repeat(v.reshape(8, 4).max(1), 4),
    "quad_min(v)": lambda v: np.repeat(v.reshape(8, 4).min(1), 4),
    "quad_xor(v)": lambda v: np.repeat(np.bitwise_xor.reduce(v.reshape(8, 4), 1), 4),
    "quad_shuffle(v, 3 - lane % 4)": lambda v: v.reshape(8, 4)[:, ::-1].ravel(),
    "quad_shuffle_xor(v, 1)": lambda v: v[LANES ^ 1],
    "quad_broadcast(v, 2)": lambda v: np.repeat(v[2::4], 4),
    "quad_shuffle_rotate_up(v, 1)": lambda v: v[LANES // 4 * 4 + (LANES - 1) % 4],
    "quad_shuffle_rotate_down(v, 1)": lambda v: v[LANES // 4 * 4 + (LANES + 1) % 4],
    "quad_shuffle_and_fill_up(v, v + 1000, 1)": lambda v: np.where(
        LANES % 4 == 0, v[LANES | 3] + 1000, np.roll(v, 1)
    ),
    "quad_any(v == 4)": lambda v: np.repeat((v == 4).reshape(8, 4).any(1), 4),
    "quad_all(v > 2)": lambda v: np.repeat((v > 2).reshape(8, 4).all(1), 4),
}


def test_simd_and_quad_operations(load):
    text = "kernel void ops(device long* o, const device int* x, uint lane [[thread_index_in_simdgroup]]) {\n  int v = x[lane];\n"
    for k, expression in enumerate(SIMD):
        a, _, b = expression.partition(" ? ")
        value = expression if not b else f"[&] {{ int s = simd_shuffle_down(v, 4); return {a} ? s : 0; }}()"
        text += f"  o[{k} * 32 + lane] = long({value});\n"
    x = np.random.default_rng(3).permutation(60)[:32].astype(np.int32)
    x[::2] |= 1
    x[1::2] &= ~1
    out = np.zeros((len(SIMD), 32), np.int64)
    load(text + "}").launch("ops", {"o": out, "x": x}, grid=(32,), threadgroup=(32,))
    for row, (expression, expected) in zip(out, SIMD.items(), strict=True):
        assert np.array_equal(row, np.asarray(expected(x.astype(np.int64)), np.int64)), expression


def test_simd_operations_move_vectors_and_partial_simdgroups(load):
    text = """
kernel void partial(device float4* o, device float* s, uint i [[thread_index_in_threadgroup]]) {
  float4 v = float4(i, 2 * i, 0.0, 1.0);
  o[i] = simd_sum(v); s[i] = simd_broadcast_first(simd_max(float(i)));
}"""
    out, s = np.zeros((40, 4), np.float32), np.zeros(40, np.float32)
    load(text).launch("partial", {"o": out, "s": s}, grid=(40,), threadgroup=(40,))
    assert out[0].tolist() == [496, 992, 0, 32]
    assert out[39].tolist() == [sum(range(32, 40)), 2 * sum(range(32, 40)), 0, 8]
    assert (s[0], s[39]) == (31, 39)


ATOMICS = """
kernel void atomics(device atomic_uint* u, device atomic_int* i, device atomic_float* f, device atomic_uint* cas,
                    const device float* x, uint t [[thread_position_in_grid]]) {
  threadgroup atomic_uint local[2];
  if (t % 64 < 2) atomic_store_explicit(&local[t % 64], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&local[t % 2], t, memory_order_relaxed);
  atomic_fetch_add_explicit(&u[0], 1u, memory_order_relaxed);
  atomic_fetch_sub_explicit(&u[1], 2u, memory_order_relaxed);
  atomic_fetch_or_explicit(&u[2], 1u << (t % 32), memory_order_relaxed);
  atomic_fetch_and_explicit(&u[3], ~(1u << (t % 8)), memory_order_relaxed);
  atomic_fetch_xor_explicit(&u[4], t, memory_order_relaxed);
  atomic_fetch_max_explicit(&i[0], int(t) - 100, memory_order_relaxed);
  atomic_fetch_min_explicit(&i[1], int(t) - 100, memory_order_relaxed);
  atomic_fetch_add_explicit(f, x[t], memory_order_relaxed);
  uint old = atomic_load_explicit(cas, memory_order_relaxed), mine = as_type<uint>(x[t]);
  while (mine > old && !atomic_compare_exchange_weak_explicit(cas, &old, mine, memory_order_relaxed, memory_order_relaxed)) {}
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t % 64 == 0) atomic_fetch_add_explicit(&u[5], atomic_exchange_explicit(&local[0], 0u, memory_order_relaxed)
                                             + atomic_load_explicit(&local[1], memory_order_relaxed), memory_order_relaxed);
}"""


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_atomics(load, schedule):
    n = 256
    x = np.random.default_rng(4).random(n).astype(np.float32)
    u = np.array([0, 2**32 - 1, 0, 2**32 - 1, 0, 0], np.uint32)
    i, f, cas = np.zeros(2, np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint32)
    buffers = {"u": u, "i": i, "f": f, "cas": cas, "x": x}
    load(ATOMICS).launch("atomics", buffers, grid=(n,), threadgroup=(64,), schedule=schedule)
    xor = np.bitwise_xor.reduce(np.arange(n))
    assert u.tolist() == [n, 2**32 - 1 - 2 * n, 2**32 - 1, 2**32 - 256, xor, n * (n - 1) // 2]
    assert i.tolist() == [155, -100]
    assert f[0] == pytest.approx(x.sum(), rel=1e-5)
    assert cas.view(np.float32)[0] == x.max()


MATRIX = """
template <typename T>
kernel void product(const device T* a [[buffer(0)]], const device T* b [[buffer(1)]], device float* c [[buffer(2)]],
                    device T* t [[buffer(3)]], device float* e [[buffer(4)]], uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_matrix<T, 8, 8> A, B, At;
  simdgroup_load(A, a, 12);
  simdgroup_load(B, b, 8, ulong2(0, 1));
  simdgroup_load(At, a, 12, ulong2(0), true);
  simdgroup_matrix<float, 8, 8> C = simdgroup_matrix<float, 8, 8>(2), D = make_filled_simdgroup_matrix<float, 8, 8>(0.5);
  simdgroup_multiply_accumulate(C, A, B, C);
  simdgroup_store(C, c, 8);
  simdgroup_store(At, t, 8);
  simdgroup_multiply(D, A, B);
  D.thread_elements() += 1.0;
  simdgroup_store(D, e, 8, ulong2(0), true);
}
template [[host_name("product_float")]] [[kernel]] decltype(product<float>) product<float>;
template [[host_name("product_half")]] [[kernel]] void product<half>(const device half*, const device half*, device float*, device half*, device float*, uint);
"""


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_simdgroup_matrices(load, dtype):
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((8, 12)).astype(dtype), rng.standard_normal((9, 8)).astype(dtype)
    c, t, e = np.zeros((8, 8), np.float32), np.zeros((8, 8), dtype), np.zeros((8, 8), np.float32)
    name = "product_float" if dtype is np.float32 else "product_half"
    load(MATRIX).launch(name, {0: a, 1: b, 2: c, 3: t, 4: e}, grid=(32,), threadgroup=(32,))
    product = a[:, :8].astype(np.float64) @ b[1:].astype(np.float64)
    np.testing.assert_allclose(c, product + 2 * np.eye(8), atol=1e-4)
    np.testing.assert_allclose(e.T, product + 1, atol=1e-4)
    assert np.array_equal(t, a[:, :8].T)


CONSTANTS = """
constant bool scaled [[function_constant(0)]];
constant float factor_given [[function_constant(1)]];
constant float factor = is_function_constant_defined(factor_given) ? factor_given : 10.0;
constant uint TWICE [[function_constant(7)]];
constant uint four_times = TWICE * 2;
kernel void constants(device float* o, const device float* bias [[buffer(1), function_constant(scaled)]]) {
  o[0] = scaled ? factor * bias[0] : 1.0; o[1] = four_times; o[2] = is_function_constant_defined(factor_given);
}
kernel void plain(device float* o) { o[0] = 3.0; }
"""


def test_function_constants_and_their_defaults(load):
    lib = load(CONSTANTS)
    out, bias = np.zeros(3, np.float32), np.full(1, 2, np.float32)
    one = {"grid": (1,), "threadgroup": (1,)}
    lib.launch("constants", {0: out, 1: bias}, constants={0: True, 1: 0.5, "TWICE": 6}, **one)
    assert out.tolist() == [1.0, 12.0, 1.0]
    lib.launch("constants", {0: out, 1: bias}, constants={"scaled": True, 7: 1}, **one)
    assert out.tolist() == [20.0, 2.0, 0.0]
    lib.launch("constants", {0: out}, constants={"scaled": False, 7: 1}, **one)
    assert out[0] == 1.0
    with pytest.raises(msl.LaunchError, match=r"constants needs function constant 7 \(uint TWICE\)"):
        lib.launch("constants", {0: out}, constants={"scaled": False}, **one)
    with pytest.raises(msl.LaunchError, match="no function constant"):
        lib.launch("constants", {0: out}, constants={9: 1}, **one)
    lib.launch("plain", {0: out}, **one)  # reaches no constant, so it needs none
    assert out[0] == 3.0


GRID = """
kernel void where(device uint* o, uint3 p [[thread_position_in_grid]], uint3 g [[threadgroup_position_in_grid]],
    ushort3 t [[thread_position_in_threadgroup]], uint3 tpg [[threads_per_threadgroup]], uint3 n [[threads_per_grid]],
    uint3 groups [[threadgroups_per_grid]], uint i [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint sg [[simdgroup_index_in_threadgroup]], uint nsg [[simdgroups_per_threadgroup]], uint w [[threads_per_simdgroup]],
    uint3 full [[dispatch_threads_per_threadgroup]], uint2 p2 [[thread_position_in_grid]], uint q [[thread_index_in_quadgroup]],
    uint qi [[quadgroup_index_in_threadgroup]]) {
  uint k = p.x + n.x * (p.y + n.y * p.z);
  uint v[20] = {g.x, g.y, g.z, t.x, t.y, t.z, tpg.x, tpg.y, tpg.z, groups.x, groups.y, groups.z, i, lane, sg, nsg, w,
                full.x * full.y * full.z, p2.y, q + 4 * qi};
  for (uint j = 0; j < 20; ++j) o[k * 20 + j] = v[j];
}"""


def test_three_dimensional_grids_with_ragged_groups(load):
    grid, group = (10, 7, 5), (4, 3, 2)
    out = np.zeros((5, 7, 10, 20), np.uint32)
    load(GRID).launch("where", {"o": out}, grid=grid, threadgroup=group)
    for z, y, x in np.ndindex(5, 7, 10):
        at = (x, y, z)
        g = [p // s for p, s in zip(at, group, strict=True)]
        t = [p % s for p, s in zip(at, group, strict=True)]
        size = [min(s, n - k * s) for s, n, k in zip(group, grid, g, strict=True)]
        i = t[0] + size[0] * (t[1] + size[1] * t[2])
        threads = size[0] * size[1] * size[2]
        expected = [*g, *t, *size, 3, 3, 3, i, i % 32, i // 32, -(-threads // 32), 32, 24, y, i]
        assert out[z, y, x].tolist() == expected


def test_groups_are_whole_and_scalars_bind_by_value(load):
    text = """
struct Shape { uint rows; float scale; ushort2 pad; };
kernel void fill(device float* o [[buffer(3)]], constant Shape& s [[buffer(0)]], constant uchar& k [[buffer(1)]],
                 threadgroup float* shared [[threadgroup(0)]], uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  shared[t] = s.scale * i + k; threadgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = shared[31 - t] + s.rows + s.pad.y;
}"""
    lib = load(text)
    out = np.zeros(64, np.float32)
    shape = np.zeros(1, np.dtype([("rows", "u4"), ("scale", "f4"), ("pad", "u2", 2)]))
    shape[0] = (100, 0.5, (0, 9))
    sizes = {"groups": (2,), "threadgroup": (32,), "threadgroup_memory": {0: 128}}
    report = lib.launch("fill", {"o": out, "s": shape, "k": 3}, **sizes)
    i = np.arange(64)
    assert np.array_equal(out, (i // 32 * 32 + 31 - i % 32) * 0.5 + 3 + 109)
    assert report.threadgroup_bytes == 128
    lib.launch("fill", {3: out * 0, 0: shape.tobytes(), 1: np.uint8(3)}, **sizes)
    with pytest.raises(msl.LaunchError, match=r"buffer 0 \(constant Shape&s\) must hold 12 bytes but got 8"):
        lib.launch("fill", {3: out, 0: bytes(8), 1: 3}, **sizes)


def test_overloads_that_differ_in_address_spaces_only(load):
    text = """
inline float first(const device float* p) { return p[0]; }
inline float first(const threadgroup float* p) { return p[0]; }
inline float first(thread const float* p) { return p[0]; }
struct Cell {
  float v;
  float get() const device { return v; }
  float get() const thread { return v; }
  float get() const threadgroup;
};
template <typename P> struct Of { static constexpr constant int n = 0; };
template <typename U> struct Of<device U*> { static constexpr constant int n = 7; };
template <typename U> struct Of<threadgroup U*> { static constexpr constant int n = 7; };
kernel void overloads(device float* o, const device Cell* c) {
  threadgroup float s[1]; threadgroup Cell cell, *at = &cell; float mine[1] = {4.0};
  s[0] = 2.0; at->v = 1.0; Cell copy = c[0];
  o[0] = first(o + 1) + first(s) + first(mine) + copy.get() + c[0].get() + at->v + Of<device int*>::n;
}"""
    out = np.array([0, 10], np.float32)
    load(text.replace(", *at = &cell", "; threadgroup Cell* at = &cell")).launch(
        "overloads", {"o": out, "c": np.full(1, 100, np.float32)}, grid=(1,), threadgroup=(1,)
    )
    assert out[0] == 10 + 2 + 4 + 200 + 1 + 7


MATH = {
    "exp(x)": np.exp, "exp2(x)": np.exp2, "exp10(x)": lambda x: 10**x, "log(x + 3)": lambda x: np.log(x + 3),
    "log2(x + 3)": lambda x: np.log2(x + 3), "log10(x + 3)": lambda x: np.log10(x + 3), "sqrt(x + 3)": lambda x: np.sqrt(x + 3),
    "rsqrt(x + 3)": lambda x: 1 / np.sqrt(x + 3), "sin(x)": np.sin, "cos(x)": np.cos, "tan(x)": np.tan, "asin(x / 3)": lambda x: np.arcsin(x / 3),
    "acos(x / 3)": lambda x: np.arccos(x / 3), "atan(x)": np.arctan, "sinh(x)": np.sinh, "cosh(x)": np.cosh, "tanh(x)": np.tanh,
    "asinh(x)": np.arcsinh, "acosh(x + 4)": lambda x: np.arccosh(x + 4), "atanh(x / 3)": lambda x: np.arctanh(x / 3),
    "sinpi(x)": lambda x: np.sin(np.pi * x), "floor(x)": np.floor, "ceil(x)": np.ceil, "trunc(x)": np.trunc, "rint(x)": np.rint,
    "round(x)": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5), "fract(x)": lambda x: x - np.floor(x), "abs(x)": np.abs,
    "sign(x)": np.sign, "saturate(x)": lambda x: np.clip(x, 0, 1), "pow(abs(x), 1.5)": lambda x: np.abs(x) ** 1.5,
    "atan2(x, 2.0)": lambda x: np.arctan2(x, 2), "fmod(x, 0.7)": lambda x: np.fmod(x, 0.7), "copysign(2.0, x)": lambda x: np.copysign(2, x),
    "fma(x, x, 1.0)": lambda x: x * x + 1, "mix(x, 5.0, 0.25)": lambda x: x + (5 - x) * 0.25, "step(0.5, x)": lambda x: (x >= 0.5) * 1.0,
    "smoothstep(-1.0, 1.0, x)": lambda x: (t := np.clip((x + 1) / 2, 0, 1)) ** 2 * (3 - 2 * t), "ldexp(x, 3)": lambda x: x * 8,
    "precise::exp(x)": np.exp, "fast::exp(x)": np.exp, "max(x, 0.0)": lambda x: np.maximum(x, 0), "min3(x, 0.5, 1.0)": lambda x: np.minimum(x, 0.5),
    "median3(x, -1.0, 1.0)": lambda x: np.clip(x, -1, 1), "float(isnan(x / 0.0 * 0.0))": lambda x: np.ones_like(x),
}  # fmt: skip
INTEGERS = {
    "popcount(u)": lambda u: np.bitwise_count(u), "clz(u)": lambda u: 32 - np.floor(np.log2(u)).astype(np.int64) - 1,
    "ctz(u)": lambda u: np.log2(u & -u).astype(np.int64), "reverse_bits(u)": lambda u: np.array([int(f"{v:032b}"[::-1], 2) for v in u]),
    "mulhi(u, u)": lambda u: u.astype(np.uint64) ** 2 >> np.uint64(32), "rotate(u, 5u)": lambda u: (u << 5 | u >> 27) & 0xFFFFFFFF, "extract_bits(u, 3, 7)": lambda u: u >> 3 & 127,
    "insert_bits(0u, u, 4, 8)": lambda u: (u & 255) << 4, "addsat(u, 4000000000u)": lambda u: np.minimum(u + 4000000000, 2**32 - 1),
    "subsat(1000u, u)": lambda u: np.maximum(1000 - u, 0), "hadd(u, 3u)": lambda u: (u + 3) >> 1, "absdiff(u, 500u)": lambda u: np.abs(u - 500),
    "uint(int(u) >> 1)": lambda u: (u.astype(np.int32) >> 1).astype(np.uint32), "u / 7 + u % 7": lambda u: u // 7 + u % 7,
}  # fmt: skip


def test_math_and_integer_functions(load):
    text = "kernel void functions(device float* f, device uint* n, const device float* xs, const device uint* us, constant uint& N,\n"
    text += "    uint i [[thread_position_in_grid]]) { float x = xs[i]; uint u = us[i];\n"
    text += "".join(f"  f[{k} * N + i] = {e};\n" for k, e in enumerate(MATH))
    text += "".join(f"  n[{k} * N + i] = {e};\n" for k, e in enumerate(INTEGERS)) + "}"
    rng = np.random.default_rng(6)
    x, u = rng.uniform(-2.5, 2.5, 40).astype(np.float32), rng.integers(1, 2**32, 40, dtype=np.uint32)
    f, n = np.zeros((len(MATH), 40), np.float32), np.zeros((len(INTEGERS), 40), np.uint32)
    load(text).launch("functions", {"f": f, "n": n, "xs": x, "us": u, "N": 40}, grid=(40,), threadgroup=(40,))
    for row, (expression, expected) in zip(f, MATH.items(), strict=True):
        np.testing.assert_allclose(
            row, expected(x.astype(np.float64)), rtol=3e-5, atol=2e-6, err_msg=expression
        )
    for row, (expression, expected) in zip(n, INTEGERS.items(), strict=True):
        assert np.array_equal(row, np.asarray(expected(u.astype(np.int64))).astype(np.int64)), expression
