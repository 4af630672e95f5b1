#pragma once
// The steps that rows of a decoder have missed while their features had no entries: Adam with gradient 0 and the
// renorm, one step after the other, by one threadgroup a row. A thread keeps to its own columns, so the row may lie in
// the memory of the old one, and stays in the cache from one step to the next.

#include "common/adam.h"
#include "common/reduce.h"

/** corrections [count, 2]: step size and 1 / sqrt(1 - beta2^t) of the last steps, up to `step`; a step size of NaN:
 * nobody made that step. */
template <int V, typename M>
[[kernel, max_total_threads_per_threadgroup(256)]] void adam_catch_up(
    const device float* w [[buffer(0)]], const device M* m [[buffer(1)]], const device M* v [[buffer(2)]],
    const device int* last_step [[buffer(3)]], const device bool* rows [[buffer(4)]],
    const device float* corrections [[buffer(5)]], device float* w_out [[buffer(6)]], device M* m_out [[buffer(7)]],
    device M* v_out [[buffer(8)]], device int* last_step_out [[buffer(9)]], constant float& beta1 [[buffer(10)]],
    constant float& beta2 [[buffer(11)]], constant float& eps [[buffer(12)]], constant int& step [[buffer(13)]],
    constant uint& count [[buffer(14)]], constant uint& d [[buffer(15)]], constant uint& normalize [[buffer(16)]],
    uint j [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float pad[kPad];
  uint turn = 0;
  const int last = last_step[j];
  threadgroup_barrier(mem_flags::mem_device);  // all have read it before it is written over
  const bool missed = rows[j] && last < step;
  if (tid == 0) last_step_out[j] = missed ? step : last;
  const ulong row = ulong(j) * d;
  const uint stride = simdgroups * kSimd * V;
  copy_row<V, M>(w, m, v, w_out, m_out, v_out, row, d, tid * V, stride);
  if (!missed) return;
  Adam adam;
  adam.beta1 = beta1;
  adam.beta2 = beta2;
  adam.eps = eps;
  adam.clip = 1.0f;
  const int oldest = step - int(count) + 1;
  for (int i = max(last, oldest - 1) + 1 - oldest; i < int(count); ++i) {
    adam.step_size = corrections[2 * i];
    adam.inverse = corrections[2 * i + 1];
    adam.seed = uint(oldest + i);
    if ((as_type<uint>(adam.step_size) & 0x7fffffffu) > 0x7f800000u) continue;
    Lanes<V> norm = Lanes<V>(0.0f);
    for (uint c = tid * V; c < d; c += stride) {
      const ulong place = row + c;
      const Lanes<V> stepped =
          adam_piece<V, M>(adam, true, load<float, V>(w_out + place), Lanes<V>(0.0f), m_out + place, v_out + place,
                           m_out + place, v_out + place, noise_dec(adam, j) + c);
      store<float, V>(w_out + place, stepped);
      norm += stepped * stepped;
    }
    if (normalize == 0) continue;
    float total[1] = {sum(norm)};
    team_sum<1, true>(total, pad, turn, lane, simdgroup, simdgroups);
    if (!(total[0] > 0.0f)) continue;
    const float inverse = 1.0f / precise::sqrt(total[0]);
    for (uint c = tid * V; c < d; c += stride)
      store<float, V>(w_out + row + c, load<float, V>(w_out + row + c) * inverse);
  }
}
