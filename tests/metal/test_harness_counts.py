"""Counted mode: bytes, transactions, bank conflicts and operations equal what is known of simple kernels."""

from __future__ import annotations

import msl
import numpy as np
import pytest

TEXT = """#include <metal_stdlib>
using namespace metal;
kernel void copy4(const device float4* x, device float4* y, uint i [[thread_position_in_grid]]) { y[i] = x[i] * 2.0; }
kernel void widen(const device half4* x, device float4* y, uint i [[thread_position_in_grid]]) { y[i] = float4(x[i]); }
kernel void strided(const device float* x, device float* y, uint i [[thread_position_in_grid]]) { y[i] = x[i * 32]; }
kernel void shifted(const device float* x, device float* y, uint i [[thread_position_in_grid]]) { y[i] = x[i + 1]; }
kernel void mean(const device float* x, device float* y, constant uint& n, uint i [[thread_position_in_grid]]) {
  float s = 0;
  for (uint j = 0; j < n; ++j) s += x[j];
  y[i] = s / n;
}
kernel void increment(device float* y, uint i [[thread_position_in_grid]]) { y[i] += 1.0; }
kernel void columns(device float* y, uint i [[thread_index_in_threadgroup]]) {
  threadgroup float s[32][32];
  for (uint r = 0; r < 32; ++r) s[r][i] = i;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float a = 0;
  for (uint r = 0; r < 32; ++r) a += s[i][r];
  y[i] = a;
}
kernel void padded(device float* y, uint i [[thread_index_in_threadgroup]]) {
  threadgroup float s[32][33];
  for (uint r = 0; r < 32; ++r) s[r][i] = i;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float a = 0;
  for (uint r = 0; r < 32; ++r) a += s[i][r];
  y[i] = simd_sum(a);
}
kernel void histogram(const device uint* x, device atomic_uint* y, uint i [[thread_position_in_grid]]) {
  threadgroup atomic_uint local[4];
  if (i % 64 < 4) atomic_store_explicit(&local[i % 64], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&local[x[i]], 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i % 64 < 4) atomic_fetch_add_explicit(&y[i % 64], atomic_load_explicit(&local[i % 64], memory_order_relaxed), memory_order_relaxed);
}
kernel void product(const device half* a, const device half* b, device float* c) {
  simdgroup_half8x8 A, B;
  simdgroup_float8x8 C = simdgroup_float8x8(0);
  for (uint k = 0; k < 4; ++k) {
    simdgroup_load(A, a + 8 * k, 32);
    simdgroup_load(B, b + 64 * k, 8);
    simdgroup_multiply_accumulate(C, A, B, C);
  }
  simdgroup_store(C, c, 8);
}
"""


@pytest.fixture(scope="module")
def count(compiler):
    lib = msl.load(TEXT, mode="counted", compiler=compiler)

    def counts(name, *buffers, n, group=256) -> msl.Counts:
        return lib.launch(name, dict(enumerate(buffers)), grid=(n,), threadgroup=(min(n, group),)).counts

    return counts


def zeros(n, dtype=np.float32):
    return np.zeros(n, dtype)


def test_coalesced_vectors(count):
    c = count("copy4", zeros(4096), zeros(4096), n=1024)
    assert (c.buffers["x"].read_bytes, c.buffers["y"].write_bytes) == (16384, 16384)
    assert (c.buffers["x"].read_transactions, c.buffers["y"].write_transactions) == (128, 128)
    assert (c.bytes, c.unique_bytes, c.group_bytes, c.efficiency) == (32768, 32768, 32768, 1.0)
    assert (c.threadgroups, c.threads, c.dispatches) == (4, 1024, 1)
    c = count("widen", zeros(4096, np.float16), zeros(4096), n=1024)
    assert (c.buffers["x"].bytes, c.buffers["x"].transactions, c.efficiency) == (8192, 64, 1.0)


def test_strides_and_misplaced_starts_cost_transactions(count):
    c = count("strided", zeros(4096), zeros(128), n=128)
    assert (c.buffers["x"].transactions, c.buffers["x"].efficiency) == (128, 1 / 32)
    c = count("shifted", zeros(129), zeros(128), n=128)
    assert (c.buffers["x"].transactions, c.buffers["x"].efficiency) == (8, 0.5)
    assert c.buffers["x"].read_lines == 5


def test_scalar_accesses_count_apart_and_caches_are_modelled(count):
    c = count("mean", zeros(100), zeros(128), np.uint32(100), n=128, group=64)
    x = c.buffers["x"]
    assert (x.scalar_accesses, x.scalar_bytes, x.read_bytes, x.transactions) == (400, 1600, 1600, 0)
    assert (x.group_bytes, x.unique_bytes) == (2 * 4 * 128, 4 * 128)
    assert c.efficiency == 1.0


def test_a_read_before_a_write_is_counted(count):
    y = count("increment", zeros(256), n=256).buffers["y"]
    assert (y.read_bytes, y.write_bytes) == (1024, 1024)


def test_bank_conflicts(count):
    c = count("columns", zeros(32), n=32)
    assert (c.threadgroup_write_bytes, c.threadgroup_read_bytes) == (4096, 4096)
    assert (c.threadgroup_cycles, c.threadgroup_ideal_cycles, c.bank_conflicts) == (32 + 1024, 64, 15.5)
    assert c.threadgroup_barriers == 1
    c = count("padded", zeros(32), n=32)
    assert (c.threadgroup_cycles, c.bank_conflicts, c.simd_operations) == (64, 0.0, 1)


def test_atomics_and_matrix_products(count):
    c = count("histogram", zeros(128, np.uint32), zeros(4, np.uint32), n=128, group=64)
    assert (c.atomics, c.threadgroup_atomics, c.threadgroup_barriers) == (8, 2 * (4 + 64 + 4), 4)
    c = count("product", zeros(256, np.float16), zeros(256, np.float16), zeros(64), n=32)
    assert c.matrix_multiplies == 4


def test_counts_add_up(count):
    a, b = count("copy4", zeros(256), zeros(256), n=64), count("increment", zeros(256), n=256)
    c = a + b + msl.Counts()
    assert c.bytes == a.bytes + b.bytes
    assert c.buffers["y"].bytes == 1024 + 2048
    assert (c.dispatches, c.threads) == (2, 64 + 256)
