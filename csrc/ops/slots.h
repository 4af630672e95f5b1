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

/** The row of each of nnz entries in compressed rows; n where an entry is in no row. */
inline mx::array entry_rows(const mx::array& offsets, int nnz, mx::Stream s) {
  if (offsets.shape(0) == 1) return mx::zeros({nnz}, mx::int32, s);
  auto ends = mx::minimum(mx::slice(offsets, {1}, {offsets.shape(0)}, s), mx::array(nnz, mx::int64), s);
  auto steps = mx::scatter_add(mx::zeros({nnz + 1}, mx::int32, s), mx::astype(ends, mx::int32, s),
                               mx::ones({ends.shape(0), 1}, mx::int32, s), 0, s);
  return mx::stop_gradient(mx::slice(mx::cumsum(steps, 0, false, true, s), {0}, {nnz}, s), s);
}

/** Ranges of entries for which [entries, d] stays below 2^26 elements. */
inline std::vector<std::pair<int, int>> entry_chunks(int nnz, int64_t d) { return slot_chunks(nnz, 1, d); }

inline mx::array entries(const mx::array& a, int begin, int end, mx::Stream s) {
  return mx::slice(a, {begin}, {end}, s);
}

inline mx::array columns(const mx::array& a, int begin, int end, mx::Stream s) {
  return mx::slice(a, {0, begin}, {a.shape(0), end}, s);
}

/** Matrices of which some are batched along an axis, as taller matrices: (batch, each [batch * n, ...]). */
inline std::pair<int, Arrays> batch_rows(const Arrays& arrays, const std::vector<int>& axes, mx::Stream s) {
  int batch = batch_of(arrays, axes);
  Arrays rows;
  for (size_t i = 0; i < axes.size(); ++i) {
    auto a = axes[i] >= 0 ? mx::moveaxis(arrays[i], axes[i], 0, s) : mx::expand_dims(arrays[i], 0, s);
    if (axes[i] < 0) a = mx::broadcast_to(a, {batch, a.shape(1), a.shape(2)}, s);
    rows.push_back(mx::flatten(a, 0, 1, s));
  }
  return {batch, rows};
}

}  // namespace mlxsae
