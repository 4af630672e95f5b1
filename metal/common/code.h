#pragma once
// Sparse codes row by row: k slots a row, or compressed rows with offsets.

#include "common/lanes.h"

/** In the place of k: the code is in compressed rows. */
constant constexpr uint kCompressed = 0xffffffffu;

/** The entries of row t, from x to y. Offsets that do not ascend never lead out of the code's `room` entries. */
METAL_FUNC ulong2 row_span(const device long* offsets, uint k, ulong room, uint t) {
  if (k != kCompressed) return ulong2(ulong(t) * k, ulong(t) * k + k);
  ulong end = min(ulong(max(offsets[t + 1], long(0))), room);
  return ulong2(min(ulong(max(offsets[t], long(0))), end), end);
}

/** How many entries are in rows. */
METAL_FUNC ulong code_size(const device long* offsets, uint k, ulong room, uint n) {
  return k == kCompressed ? min(ulong(max(offsets[n], long(0))), room) : ulong(n) * k;
}

/** The row of entry e, which is in one. */
METAL_FUNC uint entry_row(const device long* offsets, uint k, uint n, ulong e) {
  if (k != kCompressed) return uint(e / k);
  uint low = 0, high = n;  // offsets[low] <= e < offsets[high]
  while (high - low > 1) {
    uint middle = low + (high - low) / 2;
    if (ulong(offsets[middle]) <= e)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/** The threads for which `yes` holds, one bit each. */
METAL_FUNC uint ballot(bool yes) {
  simd_vote votes = simd_ballot(yes);
  return uint(simd_vote::vote_t(votes));
}
