"""The checked mode finds each class of error at its line, passes correct kernels, and misses no removed barrier."""

from __future__ import annotations

import msl
import numpy as np
import pytest

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
ARGUMENTS = (
    "device float* o [[buffer(0)]], const device float* x [[buffer(1)]], constant uint& n [[buffer(2)]], "
)
THREADS = "uint t [[thread_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]], uint i [[thread_position_in_grid]]"
TG, DEV = "threadgroup_barrier(mem_flags::mem_threadgroup);", "threadgroup_barrier(mem_flags::mem_device);"

# error class, body; the line that ends in `// 0` is the one that the error must name, `// 1` the other one of a race
BAD = {
    "device write beyond the end": (msl.OutOfBounds, "o[i + 1] = 0.0; // 0"),
    "device read before the start": (msl.OutOfBounds, "o[i] =\n x[int(t) - 1]; // 0"),
    "vector read across the end": (
        msl.OutOfBounds,
        "float4 v = *(const device float4*)(x + 4 * (t / 2) + 96); // any\n o[i] = v.x;",
    ),
    "threadgroup write beyond the end": (
        msl.OutOfBounds,
        "threadgroup float s[63];\n s[t] = 1.0; // 0\n" + TG + "o[i] = s[0];",
    ),
    "threadgroup write into its neighbour": (
        msl.OutOfBounds,
        "threadgroup float a[8], b[8]; if (t < 8) { a[t] = b[t] = 0.0; }"
        + TG
        + "\n if (t == 0) a[8] = 1.0; // 0\n o[i] = b[0];",
    ),
    "another thread's memory": (
        msl.OutOfBounds,
        "threadgroup ulong at[1]; float mine[2]; mine[t & 1] = t; if (t == 0) at[0] = (ulong)&mine[0];"
        + TG
        + "\n o[i] = mine[0] + ((thread float*)at[0])[0]; // 0",
    ),
    "helper called with a bad index": (msl.OutOfBounds, "o[i] = helper(x, i + 64);"),
    "write to a const buffer": (msl.ReadOnlyWrite, "const_cast<device float*>(x)[t] = 1.0; // 0"),
    "unaligned vector": (
        msl.Misaligned,
        "if (i == 0)\n *(device float4*)o = // any\n *(const device float4*)(x + 1); // any",
    ),
    "uninitialised threadgroup memory": (
        msl.Uninitialised,
        "threadgroup float s[64]; if (t < 63) s[t] = 1.0;" + TG + "\n o[i] = s[t]; // 0",
    ),
    "threadgroup memory of the group before": (
        msl.Uninitialised,
        "threadgroup float s[64]; if (g == 0) s[t] = 1.0;" + TG + "\n o[i] = s[t]; // 0",
    ),
    "race in threadgroup memory": (
        msl.DataRace,
        "threadgroup float s[64];\n s[t] = 1.0; // 1\n\n o[i] = s[t / 2]; // 0",
    ),
    "race within a simdgroup": (
        msl.DataRace,
        "threadgroup float s[64];\n s[t] = x[i]; // 1\n simd_sum(1.0);\n o[i] = s[t ^ 1]; // 0",
    ),
    "write after read in a loop": (
        msl.DataRace,
        "threadgroup float s[64]; float a = 0.0;\n for (uint k = 0; k < 2; ++k) {\n s[t] = k; // any\n"
        + TG
        + "\n a += s[(t + 40) % 64]; // any\n }\n o[i] = a;",
    ),
    "barrier for the other kind of memory": (
        msl.DataRace,
        "threadgroup float s[64];\n s[t] = 1.0; // 1\n" + DEV + "\n o[i] = s[63 - t]; // 0",
    ),
    "simdgroup barrier across simdgroups": (
        msl.DataRace,
        "threadgroup float s[64];\n s[t] = 1.0; // 1\n simdgroup_barrier(mem_flags::mem_threadgroup);\n o[i] = s[63 - t]; // 0",
    ),
    "race in device memory": (msl.DataRace, "o[i] = t;\n float a = o[i ^ 1]; // any\n" + DEV + "o[i] = a;"),
    "race across threadgroups": (msl.DataRace, "if (t == 0)\n o[0] += x[g]; // any"),
    "read of what another threadgroup wrote": (
        msl.DataRace,
        "o[i] = 1.0;" + DEV + "\n float a = o[(i + 64) % n]; // any\n" + DEV + "o[i] = a;",
    ),
    "plain read beside an atomic": (
        msl.DataRace,
        "device atomic_uint* a = (device atomic_uint*)o;\n if (t == 0) atomic_fetch_add_explicit(a, 1u, memory_order_relaxed);\n"
        " float v = o[0]; // any\n" + DEV + "o[i] = v;",
    ),
    "barrier in a branch": (
        msl.Divergence,
        "if (t < 32)\n threadgroup_barrier(mem_flags::mem_threadgroup); // 0\n o[i] = 1.0;",
    ),
    "barrier after an early return": (
        msl.Divergence,
        "if (t >= 40) return;\n threadgroup_barrier(mem_flags::mem_none); // 0\n o[i] = 1.0;",
    ),
    "barriers in both branches": (
        msl.Divergence,
        "if (t < 32)\n threadgroup_barrier(mem_flags::mem_threadgroup); // any\n else\n threadgroup_barrier(mem_flags::mem_threadgroup); // any",
    ),
    "two kinds of barrier": (
        msl.Divergence,
        "if (t < 32)\n threadgroup_barrier(mem_flags::mem_threadgroup); // any\n else\n threadgroup_barrier(mem_flags::mem_device); // any",
    ),
    "simd operation in a branch": (msl.Divergence, "if (t % 32 < 7)\n o[i] = simd_sum(1.0); // any\n " + TG),
    "simd operations in both branches": (
        msl.Divergence,
        "if (t % 32 < 7)\n o[i] = simd_sum(1.0); // any\n else\n o[i] = simd_sum(2.0); // any",
    ),
    "two simd operations": (
        msl.Divergence,
        "if (t % 32 < 7)\n o[i] = simd_sum(1.0); // any\n else\n o[i] = simd_max(2.0); // any",
    ),
    "simdgroup barrier with exited lanes": (
        msl.Divergence,
        "if (t % 32 > 20) return;\n simdgroup_barrier(mem_flags::mem_none); // 0\n o[i] = 1.0;",
    ),
    "shuffle from an inactive lane": (
        msl.Misuse,
        "if (t % 32 >= 16) return;\n o[i] = simd_shuffle(1.0, 20); // 0",
    ),
    "matrix without all lanes": (
        msl.Misuse,
        "if (t % 32 >= 16) return;\n simdgroup_float8x8 m = simdgroup_float8x8(1), d;\n simdgroup_multiply(d, m, m); // 0\n simdgroup_store(d, o);",
    ),
    "too much threadgroup memory": (
        msl.ThreadgroupMemory,
        "threadgroup float s[4096], r[4097]; s[t] = r[t] = 1.0; o[i] = s[t];",
    ),
    "a loop that waits for ever": (
        msl.Hang,
        "device atomic_uint* a = (device atomic_uint*)o;\n while (atomic_load_explicit(a, memory_order_relaxed) != 7u) {}",
    ),
}


def _source(bodies: dict[str, str]) -> str:
    text = HEAD + "inline float helper(const device float* p, uint k) {\n  return p[k]; // helper\n}\n"
    return text + "".join(
        f"kernel void {name}({ARGUMENTS}{THREADS}) {{\n{body}\n}}\n" for name, body in bodies.items()
    )


def _launch(lib: msl.Library, name: str, **options) -> np.ndarray:
    out, x = np.zeros(128, np.float32), np.ones(128, np.float32)
    lib.launch(name, {"o": out, "x": x, "n": 128}, grid=(128,), threadgroup=(64,), **options)
    return out


@pytest.fixture(scope="module")
def bad(compiler):
    bodies = {f"bad{k}": body for k, (_, body) in enumerate(BAD.values())}
    text = _source(bodies)
    return text.split("\n"), msl.load(text, mode="checked", compiler=compiler)


@pytest.mark.parametrize("what", BAD)
def test_each_error_is_found_at_its_line(bad, what):
    lines, lib = bad
    k = list(BAD).index(what)
    error, body = BAD[what]
    with pytest.raises(error) as caught:
        _launch(lib, f"bad{k}", seconds=0.5)
    start = lines.index(f"kernel void bad{k}({ARGUMENTS}{THREADS}) {{") + 1

    def marked(mark):
        return {start + j + 1 for j, line in enumerate(body.split("\n")) if line.endswith(mark)}

    found = [line for _, line in caught.value.places]
    if "helper" in body:
        assert lines[found[0] - 1].endswith("// helper")
    elif marked("// 0"):
        assert {found[0]} == marked("// 0"), str(caught.value)
        assert not marked("// 1") or {found[1]} == marked("// 1"), str(caught.value)
    elif marked("// any"):
        assert found, str(caught.value)
        assert marked("// any") & set(found), str(caught.value)
    assert str(caught.value).startswith(f"[bad{k}] ")


def test_divergence_is_found_without_checks(compiler):
    names = [
        k
        for k, (error, _) in enumerate(BAD.values())
        if error in (msl.Divergence, msl.Misuse, msl.ThreadgroupMemory)
    ]
    lib = msl.load(
        _source({f"bad{k}": list(BAD.values())[k][1] for k in names}), mode="fast", compiler=compiler
    )
    for k in names:
        with pytest.raises(list(BAD.values())[k][0]):
            _launch(lib, f"bad{k}")


def test_an_output_declared_undefined_must_be_written_before_it_is_read(any_compiler):
    lib = msl.load(_source({"grow": "o[i] += 1.0;"}), mode="checked")
    assert _launch(lib, "grow").tolist() == [1.0] * 128
    with pytest.raises(msl.Uninitialised, match=r"buffer\(0\) \+ 0"):
        _launch(lib, "grow", undefined=["o"])


def test_a_reader_of_many_is_remembered(any_compiler):
    """The writer races with one reader of an earlier simdgroup barrier's epoch, not with the last one."""
    body = """threadgroup float s[64]; if (t == 5) s[0] = 1.0;
threadgroup_barrier(mem_flags::mem_threadgroup);
float a = t == 33 ? s[0] : 0.0;
simdgroup_barrier(mem_flags::mem_threadgroup);
if (t == 5) a = s[0];
if (t == 5) s[0] = 2.0;
o[i] = a;"""
    with pytest.raises(msl.DataRace):
        _launch(msl.load(_source({"many": body}), mode="checked"), "many")


# Correct kernels in which every barrier is needed.
GOOD = (
    HEAD
    + """
kernel void rowsum(device float* o, const device float* x, constant uint& n, uint g [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]],
    uint nsg [[simdgroups_per_threadgroup]]) {
  threadgroup float part[32];
  for (uint row = 2 * g; row < 2 * g + 2; ++row) {
    float a = 0.0;
    for (uint k = t; k < n; k += 32 * nsg) a += x[row * n + k];
    a = simd_sum(a);
    if (lane == 0) part[sg] = a;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg == 0) {
      a = simd_sum(lane < nsg ? part[lane] : 0.0);
      if (lane == 0) o[row] = a;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

kernel void transpose(device float* o, const device float* x, constant uint& n, uint2 g [[threadgroup_position_in_grid]],
    uint2 t [[thread_position_in_threadgroup]]) {
  threadgroup float tile[8][9];
  tile[t.y][t.x] = x[(g.y * 8 + t.y) * n + g.x * 8 + t.x];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[(g.x * 8 + t.y) * n + g.y * 8 + t.x] = tile[t.x][t.y];
}

kernel void pairs(device float* o, const device float* x, uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],
    uint sg [[simdgroup_index_in_threadgroup]]) {
  threadgroup half s[8][32];
  s[sg][t % 32] = half(x[i]);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float a = s[sg][31 - t % 32];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  s[sg][t % 32] = half(a + 1.0);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = s[sg][31 - t % 32];
}

kernel void sorted(device uint* o, device uint* scratch, const device uint* x, constant uint& n, uint t [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  threadgroup atomic_uint count[16];
  threadgroup uint start[16];
  for (uint k = t; k < 16; k += threads) atomic_store_explicit(&count[k], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint k = t; k < n; k += threads) {
    atomic_fetch_add_explicit(&count[x[k]], 1u, memory_order_relaxed);
    scratch[k] = x[k] + 1;
  }
  threadgroup_barrier(mem_flags::mem_device_and_threadgroup);
  if (t < 16) {
    uint s = 0;
    for (uint k = 0; k < t; ++k) s += atomic_load_explicit(&count[k], memory_order_relaxed);
    start[t] = s;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t < 16)
    for (uint k = 0, at = start[t]; k < n; ++k)
      if (scratch[k] == t + 1) o[at++] = t;
  if (t == 0) o[n] = start[15];
}
"""
)


def run_good(lib: msl.Library, schedule: int = 0) -> None:
    rng = np.random.default_rng(7)
    x, out = rng.standard_normal((6, 300)).astype(np.float32), np.zeros(6, np.float32)
    options = {"schedule": schedule}
    if "rowsum" in lib.kernels:
        lib.launch("rowsum", {"o": out, "x": x, "n": 300}, groups=(3,), threadgroup=(128,), **options)
        np.testing.assert_allclose(out, x.sum(1), rtol=1e-4, atol=1e-4)
    if "transpose" in lib.kernels:
        m, mt = rng.standard_normal((16, 16)).astype(np.float32), np.zeros((16, 16), np.float32)
        lib.launch("transpose", {"o": mt, "x": m, "n": 16}, groups=(2, 2), threadgroup=(8, 8), **options)
        assert np.array_equal(mt, m.T)
    if "pairs" in lib.kernels:
        v, w = np.arange(96, dtype=np.float32), np.zeros(96, np.float32)
        lib.launch("pairs", {"o": w, "x": v}, grid=(96,), threadgroup=(96,), **options)
        assert np.array_equal(w, v + 1)
    if "sorted" in lib.kernels:
        u, scratch, s = (
            rng.integers(0, 16, 200).astype(np.uint32),
            np.zeros(200, np.uint32),
            np.zeros(201, np.uint32),
        )
        lib.launch(
            "sorted",
            {"o": s, "scratch": scratch, "x": u, "n": 200},
            grid=(64,),
            threadgroup=(64,),
            undefined=["o", "scratch"],
            **options,
        )
        assert np.array_equal(s[:200], np.sort(u))


@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_correct_kernels_pass_in_every_schedule(mode, compiler):
    lib = msl.load(GOOD, mode=mode, compiler=compiler)
    for schedule in (0, 1, 2, 3, 4):
        run_good(lib, schedule)


def test_every_removed_barrier_is_caught(any_compiler):
    assert len(list(msl.mutants(GOOD))) == 9
    assert [str(m) for m in msl.survivors(GOOD, run_good)] == []


def test_a_needless_barrier_survives(any_compiler):
    text = _source({"needless": "o[i] = 1.0;\n" + TG})
    alive = msl.survivors(text, lambda lib: _launch(lib, "needless"))
    assert [str(m) for m in alive] == [
        "inline.metal:8 without threadgroup_barrier(mem_flags::mem_threadgroup)"
    ]
    with pytest.raises(ValueError, match="must have a barrier"):
        msl.survivors(_source({"none": "o[i] = 1.0;"}), lambda lib: None)
