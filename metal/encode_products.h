#pragma once
// What the encoders need beside a product by the framework: products for few rows, and the norms that bound the error
// of low precision.
//
// With bars for the roundings, u = 2^-24 and gamma = 2 (d + 16) u, the product of row x and feature w differs from the
// float32 result by at most (|x - x_bar| + gamma |x|) |w| + |x_bar| (|w - w_bar| + gamma |w_bar|) + ...: rows[0]
// columns[0]
// + rows[1] columns[1] + columns[2]. Derived in csrc/cpu/kernel_screen.h; every norm is rounded up.

#include "common/chain.h"

METAL_FUNC float norm_margin(float d) { return 1.0f + 1e-5f + d * 6e-8f; }
METAL_FUNC float chain_gamma(float d) { return 2.0f * (d + 16.0f) * 5.97e-8f; }

/** The norms of a row: of its numbers, of their rounding, of what it leaves. */
struct Norms {
  float full, rest, low;
};

/**
 * By one simdgroup. `cut` bounds the relative rounding of each number; kRound rounds to bfloat16 itself, stores that
 * and knows the rest exactly. A norm whose squares vanish is still not 0, unless the row is.
 */
template <typename T, int V, bool kRound>
METAL_FUNC void row_norms(const device T* row, device bfloat* rounded, uint d, float cut, float tiny, uint lane,
                          thread Norms& norms) {
  float full = 0.0f, rest = 0.0f, low = 0.0f, largest = 0.0f;
  for (uint c = lane * V; c < d; c += kSimd * V) {
    Lanes<V> v = load<T, V>(row + c);
    Lanes<V> a = fabs(v);
    full += sum(v * v);
    if constexpr (V == 1)
      largest = max(largest, a);
    else
      largest = max(max(max(a[0], a[1]), max(a[2], a[3])), largest);
    if constexpr (kRound) {
      Lanes<V> r;
      if constexpr (V == 1)
        r = float(bfloat(v));
      else
        r = float4(bfloat4(v));
      store<bfloat, V>(rounded + c, r);
      rest += sum((v - r) * (v - r));
      low += sum(r * r);
    }
  }
  float up = norm_margin(float(d));
  largest = simd_max(largest);
  float extra = largest > 0.0f ? tiny : 0.0f;
  norms.full = precise::sqrt(simd_sum(full)) * up + extra;
  if constexpr (kRound) {
    norms.rest = precise::sqrt(simd_sum(rest)) * up + extra;
    norms.low = precise::sqrt(simd_sum(low)) * up + extra;
  } else {
    norms.rest = cut * norms.full;
    norms.low = norms.full * (1.0f + cut);
  }
}

METAL_FUNC void store_row(device float* rows, uint row, uint n, uint d, thread const Norms& norms) {
  rows[row] = (norms.rest + chain_gamma(float(d)) * norms.full) * 1.0001f;
  rows[n + row] = norms.low;
}

/** rows [2][n] of x that is multiplied as it is. A simdgroup a row. */
template <typename T, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void encode_rows(
    const device T* x [[buffer(0)]], device float* rows [[buffer(1)]], constant uint& n [[buffer(2)]],
    constant uint& d [[buffer(3)]], constant float& cut [[buffer(4)]], constant float& tiny [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  uint row = group * simdgroups + simdgroup;
  if (row >= n) return;
  Norms norms;
  row_norms<T, V, false>(x + ulong(row) * d, nullptr, d, cut, tiny, lane, norms);
  if (lane == 0) store_row(rows, row, n, d, norms);
}

/** The same for x that is multiplied in bfloat16, to which it is rounded here. */
template <int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void encode_round(
    const device float* x [[buffer(0)]], device float* rows [[buffer(1)]], constant uint& n [[buffer(2)]],
    constant uint& d [[buffer(3)]], constant float& tiny [[buffer(5)]], device bfloat* rounded [[buffer(6)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  uint row = group * simdgroups + simdgroup;
  if (row >= n) return;
  Norms norms;
  row_norms<float, V, true>(x + ulong(row) * d, rounded + ulong(row) * d, d, 0.0f, tiny, lane, norms);
  if (lane == 0) store_row(rows, row, n, d, norms);
}

/** columns [3][d_sae] of weights that are multiplied as they are. A simdgroup a feature. */
template <typename T, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void encode_columns(
    const device T* w [[buffer(0)]], device float* columns [[buffer(1)]], constant uint& d_sae [[buffer(2)]],
    constant uint& d [[buffer(3)]], constant float& cut [[buffer(4)]], constant float& tiny [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  uint j = group * simdgroups + simdgroup;
  if (j >= d_sae) return;
  Norms norms;
  row_norms<T, V, false>(w + ulong(j) * d, nullptr, d, cut, tiny, lane, norms);
  if (lane == 0) {
    columns[j] = norms.full;
    columns[d_sae + j] = (norms.rest + chain_gamma(float(d)) * norms.low) * 1.0001f;
    columns[2 * ulong(d_sae) + j] = 4e-38f * float(d) * (1.0f + norms.full);
  }
}

constant constexpr uint kEdgeThreads = 256;

METAL_FUNC float or_infinite(float v) { return v < INFINITY ? v : INFINITY; }

/** edge [chunks][4]: the largest of each column and of |bias| over each chunk of features. A threadgroup a chunk. */
[[kernel, max_total_threads_per_threadgroup(kEdgeThreads)]] void encode_edge(
    const device float* columns [[buffer(0)]], const device float* bias [[buffer(1)]], device float* edge [[buffer(2)]],
    constant uint& d_sae [[buffer(3)]], constant uint& chunk [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float pad[4 * kEdgeThreads / kSimd];
  uint begin = group * chunk, end = min(d_sae, begin + chunk);
  float4 most = float4(0.0f);
  for (uint j = begin + thread_index; j < end; j += kEdgeThreads)
    most = max(most, float4(or_infinite(columns[j]), or_infinite(columns[d_sae + j]),
                            or_infinite(columns[2 * ulong(d_sae) + j]), or_infinite(fabs(bias[j]))));
  for (uint i = 0; i < 4; ++i) {
    float v = simd_max(most[i]);
    if (lane == 0) pad[simdgroup * 4 + i] = v;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index >= 4) return;
  float v = 0.0f;
  for (uint i = 0; i < kEdgeThreads / kSimd; ++i) v = max(v, pad[i * 4 + thread_index]);
  edge[group * 4 + thread_index] = v;
}

constant constexpr uint kChainSimdgroups = 2, kChainThreads = kChainSimdgroups * kSimd;

/**
 * The float32 results of up to N rows, without the bias: out [n, d_sae]. The weights are read once, a simdgroup takes
 * 32 features.
 */
template <typename T, int V, int N>
[[kernel, max_total_threads_per_threadgroup(kChainThreads)]] void encode_chain(
    const device T* x [[buffer(0)]], const device T* w [[buffer(1)]], device float* out [[buffer(2)]],
    constant uint& n [[buffer(3)]], constant uint& d_sae [[buffer(4)]], constant uint& d [[buffer(5)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr uint tile = kSimd * kTileRowBytes / sizeof(T), piece = N * kPieceBytes / sizeof(T);
  threadgroup T tiles[kChainSimdgroups * tile];
  threadgroup T pieces[kChainSimdgroups * piece];
  uint first = (group * kChainSimdgroups + simdgroup) * kSimd;
  if (first >= d_sae) return;
  uint rows = min(kSimd, d_sae - first);
  float results[N];
  chains<T, V, N>(x, n, w, first + min(lane, rows - 1), rows, d, tiles + simdgroup * tile, pieces + simdgroup * piece,
                  lane, results);
  if (lane >= rows) return;
  for (uint t = 0; t < N; ++t)
    if (t < n) out[ulong(t) * d_sae + first + lane] = results[t];
}
