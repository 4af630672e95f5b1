#pragma once
// out[t, i] = <rows[t], w[indices[t, i]]>.
//
// A threadgroup takes a row, its simdgroups four slots at a time, so that a piece of rows[t] serves four products. One
// threadgroup more than there are rows fills the entries that are in none with 0. An index that names no feature gives
// NaN.

#include "common/code.h"

constant constexpr int kDots = 4;

template <typename T, int V>
[[kernel]] void gather_dot(const device char* rows [[buffer(0)]], const device T* w [[buffer(1)]],
                           const device uint* indices [[buffer(2)]], const device long* offsets [[buffer(3)]],
                           device char* out [[buffer(4)]], constant uint& n [[buffer(5)]],
                           constant uint& d [[buffer(6)]], constant uint& d_sae [[buffer(7)]],
                           constant uint& k [[buffer(8)]], constant long& room [[buffer(9)]],
                           constant uint& row_type [[buffer(10)]], constant uint& out_type [[buffer(11)]],
                           uint t [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint simdgroups [[simdgroups_per_threadgroup]]) {
  if (t == n) {
    for (ulong e = code_size(offsets, k, ulong(room), n) + tid; e < ulong(room); e += simdgroups * kSimd)
      store_any<1>(out, out_type, e, 0.0f);
    return;
  }
  ulong2 span = row_span(offsets, k, ulong(room), t);
  for (ulong e0 = span.x + simdgroup * kDots; e0 < span.y; e0 += simdgroups * kDots) {
    uint dots = uint(min(ulong(kDots), span.y - e0));
    uint index = lane < dots ? indices[e0 + lane] : 0;
    bool named = index < d_sae;
    if (!named) index = 0;
    const device T* feature[kDots];
    Lanes<V> product[kDots];
    for (int q = 0; q < kDots; ++q) {
      feature[q] = w + ulong(simd_shuffle(index, ushort(q))) * d;
      product[q] = Lanes<V>(0.0f);
    }
    for (uint c = lane * V; c < d; c += kSimd * V) {
      Lanes<V> piece = load_any<V>(rows, row_type, ulong(t) * d + c);
      for (int q = 0; q < kDots; ++q)
        if (uint(q) < dots) product[q] += piece * load<T, V>(feature[q] + c);
    }
    float mine = 0.0f;
    for (int q = 0; q < kDots; ++q) {
      float dot = simd_sum(sum(product[q]));
      if (lane == uint(q)) mine = dot;
    }
    if (lane < dots) store_any<1>(out, out_type, e0 + lane, named ? mine : not_a_number());
  }
}
