#pragma once
// out[j] = sum over the entries of feature j of value * rows[row]; the entries come sorted by feature (code_sort.h).
//
// A simdgroup takes a block of columns of one feature and adds in the order of the entries: nothing is shared, nothing
// is atomic, and the result is the same in every run.

#include "common/lanes.h"

constant constexpr int kOuterUnroll = 4;

template <typename T, int V>
[[kernel]] void sparse_outer(const device T* rows [[buffer(0)]], const device uint* starts [[buffer(1)]],
                             const device uint* entry_rows [[buffer(2)]], const device float* values [[buffer(3)]],
                             device char* out [[buffer(4)]], constant uint& d [[buffer(5)]],
                             constant uint& d_sae [[buffer(6)]], constant uint& out_type [[buffer(7)]],
                             uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                             uint simdgroup [[simdgroup_index_in_threadgroup]],
                             uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr uint kBlock = kOuterUnroll * kSimd * V;
  uint blocks = (d + kBlock - 1) / kBlock;
  ulong item = ulong(group) * simdgroups + simdgroup;
  uint j = uint(item / blocks), c0 = uint(item % blocks) * kBlock;
  if (j >= d_sae) return;
  Lanes<V> row[kOuterUnroll];
  for (int u = 0; u < kOuterUnroll; ++u) row[u] = Lanes<V>(0.0f);
  uint end = starts[j + 1];
  for (uint e0 = starts[j]; e0 < end; e0 += kSimd) {
    uint count = min(kSimd, end - e0);
    uint entry_row = lane < count ? entry_rows[e0 + lane] : 0;
    float value = lane < count ? values[e0 + lane] : 0.0f;
    for (uint i = 0; i < count; ++i) {
      const device T* from = rows + ulong(simd_shuffle(entry_row, ushort(i))) * d;
      float v = simd_shuffle(value, ushort(i));
      for (int u = 0; u < kOuterUnroll; ++u) {
        uint c = c0 + (uint(u) * kSimd + lane) * V;
        if (c < d) row[u] = scaled(v, load<T, V>(from + c), row[u]);
      }
    }
  }
  for (int u = 0; u < kOuterUnroll; ++u) {
    uint c = c0 + (uint(u) * kSimd + lane) * V;
    if (c < d) store_any<V>(out, out_type, ulong(j) * d + c, row[u]);
  }
}
