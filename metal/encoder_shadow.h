#pragma once
// A float32 row in bfloat16, and what bounds the error of products with it. With u = 2^-24, gamma = 2 (d + 16) u and a
// bar for the rounding, the columns of row w are |w|, |w - w_bar| + gamma |w_bar| and what flushed subnormals can cost,
// each rounded up. Derived in csrc/cpu/kernel_screen.h.

#include "common/reduce.h"

/** The columns from the sums of w^2, (w - w_bar)^2 and w_bar^2 over a row of d numbers. */
METAL_FUNC float3 shadow_columns(float full, float rest, float low, uint d) {
  float size = float(d), up = 1.0f + 1e-5f + size * 6e-8f, gamma = 2.0f * (size + 16.0f) * 5.97e-8f;
  full = precise::sqrt(full) * up;
  rest = (precise::sqrt(rest) * up + gamma * (precise::sqrt(low) * up)) * 1.0001f;
  return float3(full, rest, 4e-38f * size * (1.0f + full));
}

METAL_FUNC void store_columns(float3 c, device float* columns, uint d_sae, uint j) {
  columns[j] = c.x;
  columns[ulong(d_sae) + j] = c.y;
  columns[2 * ulong(d_sae) + j] = c.z;
}

/** Stores the rounded numbers and adds to the three sums. */
template <int V>
METAL_FUNC void shadow_piece(Lanes<V> w, device bfloat* out, thread Lanes<V>& full, thread Lanes<V>& rest,
                             thread Lanes<V>& low) {
  store<bfloat, V>(out, w);
  Lanes<V> rounded;
  if constexpr (V == 4)
    rounded = float4(bfloat4(w));
  else
    rounded = float(bfloat(w));
  full += w * w;
  rest += (w - rounded) * (w - rounded);
  low += rounded * rounded;
}

constant constexpr uint kShadowRows = 8;  // rows of a simdgroup: their columns are stored together

template <int V>
[[kernel]] void encoder_shadow(const device float* w [[buffer(0)]], device bfloat* out [[buffer(1)]],
                               device float* columns [[buffer(2)]], constant uint& d [[buffer(3)]],
                               constant uint& d_sae [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
                               uint lane [[thread_index_in_simdgroup]],
                               uint simdgroup [[simdgroup_index_in_threadgroup]],
                               uint simdgroups [[simdgroups_per_threadgroup]]) {
  ulong first = (ulong(group) * simdgroups + simdgroup) * kShadowRows;
  if (first >= d_sae) return;
  uint count = uint(min(ulong(kShadowRows), d_sae - first));
  float3 mine = float3(0.0f);
  for (uint i = 0; i < count; ++i) {
    ulong row = (first + i) * d;
    Lanes<V> full = Lanes<V>(0.0f), rest = full, low = full;
    for (uint c = lane * V; c < d; c += kSimd * V)
      shadow_piece<V>(load<float, V>(w + row + c), out + row + c, full, rest, low);
    float3 all = shadow_columns(simd_sum(sum(full)), simd_sum(sum(rest)), simd_sum(sum(low)), d);
    if (lane == i) mine = all;
  }
  if (lane < count) store_columns(mine, columns, d_sae, uint(first) + lane);
}
