#pragma once
// Stochastic rounding of float32 to bfloat16: up or down with the probability that makes the mean exact. Rounding to
// the nearest would lose what a step adds to a long mean, wherever that is below half a bfloat16 step: a second moment
// with beta2 = 0.999 would never fall again. The noise is a hash of its place (step, matrix, row, column), so it is the
// same on every device and in every run (csrc/cpu/kernel_rounding.h, csrc/ops/feature_update.cpp).

#include "common/lanes.h"

/** A bijection of 32 bits that scatters each of them over all (Wellons, hash-prospector, 2018: "lowbias32"). */
METAL_FUNC uint scattered(uint x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/** What the noise of a row's numbers begins with: that of column c is scattered(key + c). */
METAL_FUNC uint noise_key(uint seed, uint row) { return scattered(scattered(seed) ^ row); }

/** v moved to a number of bfloat16 by 16 random bits. Such numbers and infinity stay; NaN stays NaN. */
METAL_FUNC float dithered(float v, uint noise) {
  uint bits = as_type<uint>(v);
  bits = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bits + noise;
  return as_type<float>(bits & 0xffff0000u);
}

/**
 * Stores a first and a second moment, of type M; in bfloat16 with the low and the high half of the noise at `place`
 * (noise_key + column).
 */
template <typename M, int V>
METAL_FUNC void store_moments(device M* m_out, device M* v_out, Lanes<V> m, Lanes<V> v, uint place) {
  if constexpr (sizeof(M) == 2) {
    if constexpr (V == 4) {
      for (uint i = 0; i < 4; ++i) {
        const uint noise = scattered(place + i);
        m[i] = dithered(m[i], noise & 0xffffu);
        v[i] = dithered(v[i], noise >> 16);
      }
    } else {
      const uint noise = scattered(place);
      m = dithered(m, noise & 0xffffu);
      v = dithered(v, noise >> 16);
    }
  }
  store<M, V>(m_out, m);
  store<M, V>(v_out, v);
}
