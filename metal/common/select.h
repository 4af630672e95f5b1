#pragma once
// Floats as integers in the order of selection, and the k-th largest of many.

#include "common/lanes.h"

constant constexpr int kNanKey = 0x7fffffff;
constant constexpr int kNoKey = -0x7fffffff - 1;  // below every float

/** Smaller floats have smaller keys; both zeros are one, NaN is the largest. */
METAL_FUNC int order_key(float v) {
  int bits = v == 0.0f ? 0 : as_type<int>(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return kNanKey;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

/** The float of a key; NaN for kNoKey, so that no comparison with it holds. */
METAL_FUNC float key_value(int key) { return as_type<float>(key ^ ((key >> 31) & 0x7fffffff)); }

/** The key as an unsigned number in the same order. */
METAL_FUNC uint unsigned_key(int key) { return as_type<uint>(key) ^ 0x80000000u; }
METAL_FUNC int signed_key(uint key) { return as_type<int>(key ^ 0x80000000u); }

/** max(v, 0), NaN stays. */
METAL_FUNC float relu(float v) { return v <= 0.0f ? 0.0f : v; }

/** The k-th largest of m keys, 1 <= k <= m, by one simdgroup: bit after bit below the highest in which they differ. */
METAL_FUNC int kth_largest(const device int* keys, uint m, uint k, uint lane) {
  int least = kNanKey, most = kNoKey;
  for (uint i = lane; i < m; i += kSimd) {
    int key = keys[i];
    least = min(least, key);
    most = max(most, key);
  }
  uint low = unsigned_key(simd_min(least)), high = unsigned_key(simd_max(most));
  if (low == high) return signed_key(low);
  int bit = 31 - int(clz(low ^ high));
  uint found = bit == 31 ? 0u : high & ~((2u << bit) - 1u);
  for (; bit >= 0; --bit) {
    uint trial = found | (1u << bit), count = 0;
    for (uint i = lane; i < m; i += kSimd) count += uint(unsigned_key(keys[i]) >= trial);
    if (simd_sum(count) >= k) found = trial;
  }
  return signed_key(found);
}

// The k-th largest by a threadgroup: digit after digit of 8 bits, by counting.
constant constexpr uint kBins = 256;

/** Of the key that is looked for: the digits found so far, and its rank among the keys that share them. */
struct Search {
  uint digits, rank;
};

METAL_FUNC void clear_bins(threadgroup atomic_uint* bins, uint thread_index, uint threads) {
  for (uint i = thread_index; i < kBins; i += threads) atomic_store_explicit(&bins[i], 0u, memory_order_relaxed);
}

/** Counts a key at the digit of this shift, if it shares the digits above. */
METAL_FUNC void count_key(threadgroup atomic_uint* bins, thread const Search& s, int key, uint shift) {
  uint u = unsigned_key(key);
  if (shift == 24 || u >> (shift + 8) == s.digits)
    atomic_fetch_add_explicit(&bins[(u >> shift) % kBins], 1u, memory_order_relaxed);
}

/** The next digit, by every simdgroup for itself. There are at least s.rank keys in the bins. */
METAL_FUNC void next_digit(threadgroup atomic_uint* bins, thread Search& s, uint lane) {
  constexpr uint each = kBins / kSimd;
  uint top = kBins - 1 - lane * each;  // thread 0 has the highest bins
  uint mine = 0;
  for (uint i = 0; i < each; ++i) mine += atomic_load_explicit(&bins[top - i], memory_order_relaxed);
  uint above = simd_prefix_exclusive_sum(mine);
  uint digit = 0, rank = 0;
  if (above < s.rank && s.rank <= above + mine) {
    digit = top;
    uint here = atomic_load_explicit(&bins[digit], memory_order_relaxed);
    while (above + here < s.rank) {
      above += here;
      digit -= 1;
      here = atomic_load_explicit(&bins[digit], memory_order_relaxed);
    }
    rank = s.rank - above;
  }
  s.digits = s.digits << 8 | simd_sum(digit);  // of all threads but one it is 0
  s.rank = simd_sum(rank);
}
