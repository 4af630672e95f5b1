#pragma once
// Sums over the threads that work on one row together: a simdgroup, or all of a threadgroup.

#include "common/lanes.h"

constant constexpr uint kMaxSimdgroups = 16;  // of a threadgroup that adds up
constant constexpr uint kMaxSums = 4;         // numbers added up at once
constant constexpr uint kPad = 2 * kMaxSums * kMaxSimdgroups;

/**
 * Each of v[0] to v[N - 1], summed over the team; every thread gets the sums. A threadgroup meets once: `pad` (kPad
 * floats) has two halves, and calls take turns by `turn`, so that nobody writes what another still reads.
 */
template <int N, bool kGroup>
METAL_FUNC void team_sum(thread float* v, threadgroup float* pad, thread uint& turn, uint lane, uint simdgroup,
                         uint simdgroups) {
  for (int i = 0; i < N; ++i) v[i] = simd_sum(v[i]);
  if constexpr (kGroup) {
    threadgroup float* half_pad = pad + (turn & 1) * (kPad / 2);
    turn += 1;
    if (lane == 0)
      for (int i = 0; i < N; ++i) half_pad[uint(i) * kMaxSimdgroups + simdgroup] = v[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < N; ++i) {
      float part = 0.0f;
      if (lane < simdgroups) part = half_pad[uint(i) * kMaxSimdgroups + lane];
      v[i] = simd_sum(part);
    }
  }
}
