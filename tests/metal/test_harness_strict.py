"""The strict compile and the linter refuse what Apple's compiler refuses, and accept what it accepts."""

from __future__ import annotations

import msl
import pytest

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
B, C = "device float* b [[buffer(0)]]", "constant int& n [[buffer(1)]]"

# What each must be found by; all errors stand on line 3.
REFUSED = {
    "device pointer from threadgroup": ("strict", f"kernel void k({B}, threadgroup float* s [[threadgroup(0)]]) {{ s = b; }}"),
    "threadgroup passed as device": ("strict", "inline void f(device float* p) { p[0] = 1; } kernel void k(threadgroup float* s [[threadgroup(0)]]) { f(s); }"),
    "write to const device": ("strict", "kernel void k(const device float* a [[buffer(0)]]) { a[0] = 1; }"),
    "write to constant": ("strict", "kernel void k(constant float& a [[buffer(0)]]) { a = 1; }"),
    "parameter without address space": ("both", f"inline void f(float* p) {{ p[0] = 1; }} kernel void k({B}) {{ f(b); }}"),
    "local pointer without address space": ("both", f"kernel void k({B}) {{ float* p = b; p[0] = 1; }}"),
    "reference without address space": ("both", f"kernel void k({B}) {{ float& r = b[0]; r = 1; }}"),
    "address of a local as device": ("strict", f"inline void f(device float* p) {{}} kernel void k({B}) {{ float x; f(&x); }}"),
    "atomic on constant": ("strict", "kernel void k(constant atomic_uint* a) { atomic_fetch_add_explicit(a, 1u, memory_order_relaxed); }"),
    "atomic on a plain value": ("strict", "kernel void k(device uint* a) { atomic_fetch_add_explicit(a, 1u, memory_order_relaxed); }"),
    "float atomic maximum": ("strict", "kernel void k(device atomic_float* a) { atomic_fetch_max_explicit(a, 1.0f, memory_order_relaxed); }"),
    "float atomic in threadgroup memory": ("both", f"kernel void k({B}) {{ threadgroup atomic_float s; atomic_fetch_add_explicit(&s, 1.0f, memory_order_relaxed); }}"),
    "64-bit atomic": ("lint", "kernel void k(device atomic<ulong>* a) {}"),
    "acquire order": ("both", "kernel void k(device atomic_uint* a, device uint* o) { o[0] = atomic_load_explicit(a, memory_order_acquire); }"),
    "simd operation on bfloat": ("strict", "kernel void k(device bfloat* a) { a[0] = simd_sum(a[0]); }"),
    "simd shuffle of 64 bits": ("strict", "kernel void k(device ulong* a) { a[0] = simd_shuffle_xor(a[0], 1); }"),
    "implicit conversion of vectors": ("strict", "kernel void k(device float4* b) { float4 x = b[0]; int4 y = x; b[0].x = y.x; }"),
    "implicit narrowing of vectors": ("strict", "kernel void k(device half4* b) { float4 x = float4(1.0, 2.0, 3.0, 4.0); b[0] = x; }"),
    "vector constructor's count": ("strict", "kernel void k(device float4* b) { b[0] = float4(b[0].xy, 1.0); }"),
    "matrix of another type than its memory": ("strict", "kernel void k(device half* b) { simdgroup_float8x8 m; simdgroup_load(m, b, 8); }"),
    "variable array": ("strict", f"kernel void k({B}, {C}) {{ float a[n]; a[0] = b[0]; b[0] = a[n - 1]; }}"),
    "mutable global": ("lint", f"float g = 1.0; kernel void k({B}) {{ b[0] = g; }}"),
    "constant without its space": ("lint", f"constexpr int g = 1; kernel void k({B}) {{ b[0] = g; }}"),
    "static local": ("lint", f"kernel void k({B}) {{ static int n; b[0] = n++; }}"),
    "static member": ("lint", f"struct S {{ static int n; }}; kernel void k({B}) {{}}"),
    "threadgroup variable in a helper": ("lint", f"inline float f() {{ threadgroup float s[4]; s[0] = 1; return s[0]; }} kernel void k({B}) {{ b[0] = f(); }}"),
    "double": ("both", "kernel void k(device double* b) { b[0] = 1; }"),
    "long long": ("lint", f"kernel void k({B}) {{ long long x = 1; b[0] = x; }}"),
    "recursion": ("lint", f"inline int f(int n) {{ return n ? f(n - 1) : 0; }} kernel void k({B}) {{ b[0] = f(3); }}"),
    "mutual recursion": ("lint", f"inline int g(int); inline int f(int n) {{ return n ? g(n) : 0; }} inline int g(int n) {{ return f(n - 1); }} kernel void k({B}) {{ b[0] = f(3); }}"),
    "virtual": ("lint", "struct A { virtual void f(); };"),
    "goto": ("lint", f"kernel void k({B}) {{ goto x; x: b[0] = 1; }}"),
    "new": ("both", f"kernel void k({B}) {{ device int* p = (device int*)new int; b[0] = p[0]; }}"),
    "throw": ("both", f"kernel void k({B}) {{ throw 1; }}"),
    "typeid": ("both", f"struct A {{}}; kernel void k({B}) {{ A a; (void)typeid(a); }}"),
    "thread_local": ("both", "thread_local float g;"),
    "standard library": ("lint", f"kernel void k({B}) {{ b[0] = std::min(1, 2); }}"),
    "printf": ("lint", f'kernel void k({B}) {{ printf("x"); }}'),
}  # fmt: skip

ACCEPTED = {
    "templates, references, if constexpr": f"template <typename T, int N> inline T sum(const device T* p) {{ T s = 0; if constexpr (N > 1) {{ for (int i = 0; i < N; ++i) s += p[i]; }} return s; }} inline void add(thread float& x, float y) {{ x += y; }} kernel void k({B}) {{ float x = sum<float, 4>(b); add(x, 1); b[0] = x; }}",
    "methods by address space": f"struct P {{ int a; float b; P(int x) thread : a(x), b(1) {{}} int get() const thread {{ return a; }} }}; inline int f(thread P& p) {{ P q = p; return q.get(); }} kernel void k({B}) {{ P p(3); b[0] = f(p); }}",
    "lambda": f"kernel void k({B}) {{ auto f = [](float x) {{ return x + 1; }}; b[0] = f(1); }}",
    "unsuffixed literals": f"kernel void k({B}) {{ b[0] = b[0] * 1.5 + 2.0h + 1e-3; }}",
    "constants": f"constant float table[2] = {{1.0, 2.0}}; constant constexpr uint N = 2; struct S {{ static constexpr constant int n = 3; }}; kernel void k({B}) {{ b[0] = table[N - 1] + S::n; }}",
    "threadgroup variables and pointers to them": f"kernel void k({B}, uint t [[thread_index_in_threadgroup]]) {{ threadgroup float s[4][8], one; threadgroup float* p = &s[1][0]; p[t] = 1; one = 2; threadgroup_barrier(mem_flags::mem_threadgroup); b[t] = s[1][t] + one; }}",
    "vectors": "kernel void k(device float4* b, const device half4* h) { float4 x = float4(b[0].xy, 1.0, 2.0); x.zw += float2(h[0].xy); b[0] = select(x, -x, x > 0.0f) * vec<float, 4>(2.0f); }",
    "function constants": f"constant bool c [[function_constant(0)]]; constant int d [[function_constant(1)]]; constant int e = is_function_constant_defined(d) ? d : 3; kernel void k({B}) {{ if (c) b[0] = e; }}",
    "atomics": "kernel void k(device atomic_uint* a, device atomic_float* f, device uint* o) { threadgroup atomic_int s; atomic_fetch_max_explicit(&s, 1, memory_order_relaxed); uint e = 0; atomic_compare_exchange_weak_explicit(a, &e, 1u, memory_order_relaxed, memory_order_relaxed); atomic_fetch_add_explicit(f, 1.0f, memory_order_relaxed); o[0] = e; }",
    "matrices": "template <typename T> [[kernel]] void k(const device T* a, device float* c) { simdgroup_matrix<T, 8, 8> m; simdgroup_matrix<float, 8, 8> s = simdgroup_matrix<float, 8, 8>(0), d; simdgroup_load(m, a, 8); simdgroup_multiply_accumulate(d, m, m, s); simdgroup_store(d, c, 8); } template [[host_name(\"k_half\")]] [[kernel]] decltype(k<half>) k<half>;",
    "simd": f"kernel void k({B}, uint l [[thread_index_in_simdgroup]]) {{ float4 v = float4(l); v = simd_sum(v); b[0] = simd_prefix_exclusive_sum(v.x) + simd_shuffle_xor(v.y, 1) + float(simd_vote::vote_t(simd_ballot(v.z > 1))) + simd_shuffle_and_fill_up(v.x, 0.0f, 1); }}",
    "multiplication as an expression": f"kernel void k({B}, {C}) {{ int x = n, y = 2; b[0] = x * y + (x & y); }}",
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(strict_compiler, what):
    by, text = REFUSED[what]
    if by in ("strict", "both"):
        with pytest.raises(msl.CompileError, match=r"inline\.metal:3:\d+: (error|note)"):
            msl.strict(HEAD + text)
    found = msl.lint(HEAD + text, compiler=strict_compiler)
    assert bool(found) == (by != "strict"), found
    assert all(f.line == 3 and str(f).startswith("inline.metal:3: ") for f in found)


@pytest.mark.parametrize("what", ACCEPTED)
def test_accepted(strict_compiler, what):
    msl.strict(HEAD + ACCEPTED[what])
    assert msl.lint(HEAD + ACCEPTED[what]) == []
    msl.load(HEAD + ACCEPTED[what])


def test_template_bodies_are_checked_once_instantiated(strict_compiler):
    text = HEAD + "template <typename T> [[kernel]] void k(const device T* a) { a[0] = 1; }\n"
    msl.strict(text)
    with pytest.raises(msl.CompileError, match=r"inline\.metal:3"):
        msl.strict(text + 'template [[host_name("k_float")]] [[kernel]] decltype(k<float>) k<float>;')


def test_lint_reads_includes_and_can_keep_to_the_file(any_compiler, tmp_path):
    (tmp_path / "part.h").write_text("#pragma once\n\n#include <metal_stdlib>\nstatic int counter;\n")
    main = tmp_path / "main.metal"
    main.write_text('#include "part.h"\nkernel void k(device int* o) { o[0] = 1; }\n')
    found = msl.lint(main)
    assert [(f.file, f.line, f.rule) for f in found] == [(str(tmp_path / "part.h"), 4, "global")]
    assert msl.lint(main, headers=False) == []
    (tmp_path / "math.h").write_text("")
    main.write_text("#include <math.h>\nkernel void k(device int* o) { o[0] = 1; }\n")
    assert [(f.line, f.rule) for f in msl.lint(main, include=[tmp_path])] == [(1, "include")]
