#pragma once
// The entries of codes sorted by feature, those of one feature in ascending order of their row: compressed columns.
//
// A stable counting sort, digit by digit of the feature's number, lowest first. A pass counts the digits of every tile
// of entries (code_count), turns the counts into places (code_scan), and moves the entries there (code_scatter). No
// order is left to chance, and a feature that every token uses costs no more than any other. Entries that take no part
// get the number d_sae, one past the last feature, and end up behind all others.

#include "common/code.h"

constant constexpr uint kSortThreads = 256;
constant constexpr uint kSortSimdgroups = kSortThreads / kSimd;
constant constexpr uint kSortRounds = 8;  // entries of a thread
constant constexpr uint kSortTile = kSortThreads * kSortRounds;
constant constexpr uint kMaxDigits = 256;

/** One triple (feature, row, value) for each entry, written from `first` on. `firing`: only values > 0 (and NaN) take
 * part; else all but 0. */
[[kernel]] void code_keys(const device char* values [[buffer(0)]], const device uint* indices [[buffer(1)]],
                          const device long* offsets [[buffer(2)]], device uint* keys [[buffer(3)]],
                          device uint* rows [[buffer(4)]], device float* entry_values [[buffer(5)]],
                          constant uint& n [[buffer(6)]], constant uint& k [[buffer(7)]],
                          constant long& room [[buffer(8)]], constant uint& value_type [[buffer(9)]],
                          constant uint& d_sae [[buffer(10)]], constant uint& first [[buffer(11)]],
                          constant uint& first_row [[buffer(12)]], constant bool& firing [[buffer(13)]],
                          uint e [[thread_position_in_grid]]) {
  if (ulong(e) >= ulong(room)) return;
  uint key = d_sae, row = 0;
  float value = 0.0f;
  if (ulong(e) < code_size(offsets, k, ulong(room), n)) {
    value = load_any<1>(values, value_type, e);
    if (firing ? is_firing(value) : is_used(value)) {
      key = min(indices[e], d_sae);
      row = first_row + entry_row(offsets, k, n, e);
    }
  }
  ulong place = ulong(first) + e;
  keys[place] = key;
  rows[place] = row;
  entry_values[place] = value;
}

/** counts[digit, tile]: how often each digit occurs in each tile. */
[[kernel]] void code_count(const device uint* keys [[buffer(0)]], device uint* counts [[buffer(1)]],
                           constant uint& nnz [[buffer(2)]], constant uint& shift [[buffer(3)]],
                           constant uint& bits [[buffer(4)]], uint tile [[threadgroup_position_in_grid]],
                           uint tiles [[threadgroups_per_grid]], uint tid [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint bins[kMaxDigits];
  uint digits = 1u << bits;
  atomic_store_explicit(&bins[tid], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < kSortRounds; ++i) {
    uint e = tile * kSortTile + i * kSortThreads + tid;
    if (e < nnz) atomic_fetch_add_explicit(&bins[(keys[e] >> shift) & (digits - 1)], 1u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid < digits) counts[ulong(tid) * tiles + tile] = atomic_load_explicit(&bins[tid], memory_order_relaxed);
}

/** A simdgroup a digit: its counts become the number of such entries in earlier tiles; totals[digit]. */
[[kernel]] void code_scan(device uint* counts [[buffer(0)]], device uint* totals [[buffer(1)]],
                          constant uint& tiles [[buffer(2)]], constant uint& bits [[buffer(3)]],
                          uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]],
                          uint simdgroups [[simdgroups_per_threadgroup]]) {
  uint digit = group * simdgroups + simdgroup;
  if (digit >= (1u << bits)) return;
  device uint* row = counts + ulong(digit) * tiles;
  uint before = 0;
  for (uint i = 0; i < tiles; i += kSimd) {
    uint count = i + lane < tiles ? row[i + lane] : 0;
    uint place = before + simd_prefix_exclusive_sum(count);
    if (i + lane < tiles) row[i + lane] = place;
    before += simd_sum(count);
  }
  if (lane == 0) totals[digit] = before;
}

/** Moves each entry behind those with a smaller digit, and behind those with the same digit that came earlier. */
[[kernel]] void code_scatter(const device uint* keys [[buffer(0)]], const device uint* rows [[buffer(1)]],
                             const device float* values [[buffer(2)]], device uint* keys_out [[buffer(3)]],
                             device uint* rows_out [[buffer(4)]], device float* values_out [[buffer(5)]],
                             const device uint* counts [[buffer(6)]], const device uint* totals [[buffer(7)]],
                             constant uint& nnz [[buffer(8)]], constant uint& shift [[buffer(9)]],
                             constant uint& bits [[buffer(10)]], uint tile [[threadgroup_position_in_grid]],
                             uint tiles [[threadgroups_per_grid]], uint tid [[thread_index_in_threadgroup]],
                             uint lane [[thread_index_in_simdgroup]],
                             uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint seen[kSortSimdgroups][kMaxDigits];  // by each simdgroup so far; then where its next one goes
  threadgroup uint sums[kSortSimdgroups];
  uint digits = 1u << bits;
  for (uint s = 0; s < kSortSimdgroups; ++s) seen[s][tid] = 0;
  // Entries with smaller digits, anywhere: an exclusive sum of the totals, a digit a thread.
  uint total = tid < digits ? totals[tid] : 0;
  uint smaller = simd_prefix_exclusive_sum(total);
  uint whole = simd_sum(total);
  if (lane == 0) sums[simdgroup] = whole;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint s = 0; s < simdgroup; ++s) smaller += sums[s];

  // A simdgroup's entries are neighbours, so that its order is theirs. `rank`: how many of the same digit it saw
  // before.
  uint key[kSortRounds], rank[kSortRounds];
  uint begin = tile * kSortTile + simdgroup * kSimd * kSortRounds + lane;
  for (uint i = 0; i < kSortRounds; ++i) {
    uint e = begin + i * kSimd;
    key[i] = e < nnz ? keys[e] : 0;
    uint digit = (key[i] >> shift) & (digits - 1);
    uint peers = ballot(e < nnz);
    for (uint b = 0; b < bits; ++b) {
      bool bit = ((digit >> b) & 1) != 0;
      uint same = ballot(bit);
      peers &= bit ? same : ~same;
    }
    uint earlier = peers & ((1u << lane) - 1u);
    rank[i] = seen[simdgroup][digit] + popcount(earlier);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (e < nnz && earlier == 0) seen[simdgroup][digit] += popcount(peers);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tid < digits) {
    uint place = smaller + counts[ulong(tid) * tiles + tile];
    for (uint s = 0; s < kSortSimdgroups; ++s) {
      uint count = seen[s][tid];
      seen[s][tid] = place;
      place += count;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < kSortRounds; ++i) {
    uint e = begin + i * kSimd;
    if (e >= nnz) continue;
    uint place = seen[simdgroup][(key[i] >> shift) & (digits - 1)] + rank[i];
    keys_out[place] = key[i];
    rows_out[place] = rows[e];
    values_out[place] = values[e];
  }
}

/** starts[j]: how many of the sorted keys are below j, for j in [0, d_sae]. */
[[kernel]] void code_starts(const device uint* keys [[buffer(0)]], device uint* starts [[buffer(1)]],
                            constant uint& nnz [[buffer(2)]], constant uint& d_sae [[buffer(3)]],
                            uint j [[thread_position_in_grid]]) {
  if (j > d_sae) return;
  uint low = 0, high = nnz;
  while (low < high) {
    uint middle = low + (high - low) / 2;
    if (keys[middle] < j)
      low = middle + 1;
    else
      high = middle;
  }
  starts[j] = low;
}
