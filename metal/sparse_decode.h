#pragma once
// out[t] = bias + sum_i values[t, i] w[indices[t, i]]; or, for a loss, that minus a target, and its squared length.
//
// A threadgroup takes a row, its simdgroups blocks of the row's columns. The 32 threads read 32 slots at a time, then
// walk over the used ones: a slot's row of w is one contiguous read. Sums are in the order of the slots, each addition
// rounded once, as on the CPU. An index that names no feature gives NaN.

#include "common/code.h"

constant constexpr int kDecodeUnroll = 4;  // pieces of a row in flight in each thread

template <typename T, int V, bool kResidual>
METAL_FUNC void decode_row(const device char* values, uint value_type, const device uint* indices, const device T* w,
                           const device char* bias, uint bias_type, bool has_bias, const device char* target,
                           device char* out, uint out_type, device float* square, ulong2 span, uint d, uint d_sae,
                           uint t, threadgroup float* parts, uint lane, uint simdgroup, uint simdgroups) {
  constexpr uint kStep = kSimd * V, kBlock = kDecodeUnroll * kStep;
  Lanes<V> squares = Lanes<V>(0.0f);
  for (uint c0 = simdgroup * kBlock; c0 < d; c0 += simdgroups * kBlock) {
    uint pieces = (min(kBlock, d - c0) + kStep - 1) / kStep;
    uint c[kDecodeUnroll];  // threads past the end read the last numbers once more, and keep them to themselves
    Lanes<V> row[kDecodeUnroll];
    for (int u = 0; u < kDecodeUnroll; ++u) {
      c[u] = min(c0 + (uint(u) * kSimd + lane) * V, d - V);
      row[u] = Lanes<V>(0.0f);
      if (has_bias && uint(u) < pieces) row[u] = load_any<V>(bias, bias_type, c[u]);
    }
    for (ulong e0 = span.x; e0 < span.y; e0 += kSimd) {
      float value = 0.0f;
      uint index = 0;
      if (e0 + lane < span.y) {
        value = load_any<1>(values, value_type, e0 + lane);
        index = indices[e0 + lane];
      }
      for (uint left = ballot(is_used(value)); left != 0; left &= left - 1) {
        ushort from = ushort(ctz(left));
        float v = simd_shuffle(value, from);
        uint j = simd_shuffle(index, from);
        if (j >= d_sae) {
          v = not_a_number();
          j = 0;
        }
        const device T* feature = w + ulong(j) * d;
        Lanes<V> piece[kDecodeUnroll];
        for (int u = 0; u < kDecodeUnroll; ++u)
          if (uint(u) < pieces) piece[u] = load<T, V>(feature + c[u]);
        for (int u = 0; u < kDecodeUnroll; ++u)
          if (uint(u) < pieces) row[u] = scaled(v, piece[u], row[u]);
      }
    }
    for (int u = 0; u < kDecodeUnroll; ++u) {
      if (c0 + (uint(u) * kSimd + lane) * V >= d) continue;
      ulong place = ulong(t) * d + c[u];
      if constexpr (kResidual) {
        row[u] -= load<float, V>(reinterpret_cast<const device float*>(target) + place);
        squares += row[u] * row[u];
      }
      store_any<V>(out, out_type, place, row[u]);
    }
  }
  if constexpr (kResidual) {
    float part = simd_sum(sum(squares));
    if (lane == 0) parts[simdgroup] = part;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0) {
      float total = simd_sum(lane < simdgroups ? parts[lane] : 0.0f);
      if (lane == 0) square[t] = total;
    }
  }
}

template <typename T, int V>
[[kernel]] void sparse_decode(const device char* values [[buffer(0)]], const device uint* indices [[buffer(1)]],
                              const device T* w [[buffer(2)]], const device char* bias [[buffer(3)]],
                              const device long* offsets [[buffer(4)]], device char* out [[buffer(5)]],
                              constant uint& d [[buffer(6)]], constant uint& d_sae [[buffer(7)]],
                              constant uint& k [[buffer(8)]], constant long& room [[buffer(9)]],
                              constant uint& value_type [[buffer(10)]], constant uint& bias_type [[buffer(11)]],
                              constant uint& out_type [[buffer(12)]], constant bool& has_bias [[buffer(13)]],
                              uint t [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                              uint simdgroup [[simdgroup_index_in_threadgroup]],
                              uint simdgroups [[simdgroups_per_threadgroup]]) {
  decode_row<T, V, false>(values, value_type, indices, w, bias, bias_type, has_bias, nullptr, out, out_type, nullptr,
                          row_span(offsets, k, ulong(room), t), d, d_sae, t, nullptr, lane, simdgroup, simdgroups);
}

template <int V>
[[kernel]] void decode_residual(const device char* values [[buffer(0)]], const device uint* indices [[buffer(1)]],
                                const device float* w [[buffer(2)]], const device char* bias [[buffer(3)]],
                                const device long* offsets [[buffer(4)]], device char* residual [[buffer(5)]],
                                constant uint& d [[buffer(6)]], constant uint& d_sae [[buffer(7)]],
                                constant uint& k [[buffer(8)]], constant long& room [[buffer(9)]],
                                constant bool& has_bias [[buffer(13)]], const device char* target [[buffer(14)]],
                                device float* square [[buffer(15)]], uint t [[threadgroup_position_in_grid]],
                                uint lane [[thread_index_in_simdgroup]],
                                uint simdgroup [[simdgroup_index_in_threadgroup]],
                                uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float parts[32];
  decode_row<float, V, true>(values, kF32, indices, w, bias, kF32, has_bias, target, residual, kF32, square,
                             row_span(offsets, k, ulong(room), t), d, d_sae, t, parts, lane, simdgroup, simdgroups);
}
