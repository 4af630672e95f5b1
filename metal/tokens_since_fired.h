#pragma once
// Tokens since each feature fired last: first every count grows, then the features that fired go back to 0. The stores
// of the second kernel are atomic because several entries may name one feature; whichever comes last, it is 0.

#include "common/code.h"

[[kernel]] void tokens_age(const device int* counts [[buffer(0)]], device int* out [[buffer(1)]],
                           constant uint& d_sae [[buffer(2)]], constant int& n_tokens [[buffer(3)]],
                           uint j [[thread_position_in_grid]]) {
  if (j >= d_sae) return;
  const int count = counts[j], most = 0x7fffffff;
  out[j] = count > most - n_tokens ? most : count + n_tokens;
}

[[kernel]] void tokens_fired(const device char* values [[buffer(0)]], const device uint* indices [[buffer(1)]],
                             const device long* offsets [[buffer(2)]], device atomic_int* out [[buffer(3)]],
                             constant uint& n [[buffer(4)]], constant uint& k [[buffer(5)]],
                             constant long& room [[buffer(6)]], constant uint& value_type [[buffer(7)]],
                             constant uint& d_sae [[buffer(8)]], uint e [[thread_position_in_grid]]) {
  if (ulong(e) >= code_size(offsets, k, ulong(room), n)) return;
  uint j = indices[e];
  if (j < d_sae && is_firing(load_any<1>(values, value_type, e)))
    atomic_store_explicit(&out[j], 0, memory_order_relaxed);
}
