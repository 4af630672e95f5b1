#pragma once
// Helpers of the ops on sparse codes.

#include "ops/common.h"

namespace mlxsae {

/** Ranges of slots for which [n, slots, d] stays below 2^26 elements: what a graph of plain ops may hold at a time. */
inline std::vector<std::pair<int, int>> slot_chunks(int k, int64_t n, int64_t d) {
  int64_t per_slot = std::max<int64_t>(1, n * d);
  int step = static_cast<int>(std::clamp<int64_t>((int64_t{1} << 26) / per_slot, 1, std::max(1, k)));
  std::vector<std::pair<int, int>> chunks;
  for (int i = 0; i < k; i += step) chunks.emplace_back(i, std::min(k, i + step));
  return chunks;
}

inline mx::array columns(const mx::array& a, int begin, int end, mx::Stream s) {
  return mx::slice(a, {0, begin}, {a.shape(0), end}, s);
}

/** Matrices of which some are batched along an axis, as taller matrices: (batch, each [batch * n, ...]). */
inline std::pair<int, Arrays> batch_rows(const Arrays& arrays, const std::vector<int>& axes, mx::Stream s) {
  int batch = 1;
  for (size_t i = 0; i < axes.size(); ++i)
    if (axes[i] >= 0) batch = arrays[i].shape(axes[i]);
  Arrays rows;
  for (size_t i = 0; i < axes.size(); ++i) {
    auto a = axes[i] >= 0 ? mx::moveaxis(arrays[i], axes[i], 0, s) : mx::expand_dims(arrays[i], 0, s);
    if (axes[i] < 0) a = mx::broadcast_to(a, {batch, a.shape(1), a.shape(2)}, s);
    rows.push_back(mx::flatten(a, 0, 1, s));
  }
  return {batch, rows};
}

}  // namespace mlxsae
