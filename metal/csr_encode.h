#pragma once
// Encoders whose rows vary in length: the largest pre-activations of a whole batch, and those above thresholds, in
// compressed rows.
//
// After each chunk of features the code of all features so far is made anew in compressed rows ("kept", at most `room`
// entries), from the code before and what the chunk adds ("fresh", a list for each row). Where the product is of low
// precision, fresh entries are intervals that hold their float32 results, and become these before they are kept.
// Entries are keys (common/select.h); all are positive or NaN. A unit is a row; or, where there is but one chunk and
// few rows, one of the equal parts that rows are cut into, so that units ascend by row and feature.

#include "common/chain.h"
#include "common/select.h"

struct CsrSizes {
  uint n, m, f0;      // the product is [n, m], of the features from f0 on
  uint parts, width;  // units of a row; features of a unit, a multiple of 4: room of its fresh list
  uint room;
  uint d, d_sae;
  uint first;              // 1 at the first chunk: nothing is kept yet
  float cut, least, tiny;  // as in FilterSizes of topk_encode.h
};

// Words of the state of a batch's selection.
constant constexpr uint kBound = 0;  // what has a smaller key can never be kept
constant constexpr uint kCut = 1;    // keys above it are kept,
constant constexpr uint kEqual = 2;  // and so many that are equal to it, in order of row and feature
constant constexpr uint kDigits = 3, kRank = 4, kAll = 5;  // of the search for the cut

/** Units by simdgroups; fresh lists [unit][width], counts [unit]. */
template <typename P, int V, bool kExact, bool kBatch>
METAL_FUNC void csr_collect(const device P* product, const device float* bias, const device float* bounds,
                            const device int* state, device uint* ids, device int* low, device int* up,
                            device uint* counts, const device float* rows, const device float* columns,
                            constant CsrSizes& s, uint unit, uint lane) {
  if (unit >= s.n * s.parts) return;
  uint row = unit / s.parts, begin = unit % s.parts * s.width, end = min(s.m, begin + s.width), count = 0;
  ulong list = ulong(unit) * s.width;
  int bound = 1;
  if constexpr (kBatch) bound = s.first != 0 ? 1 : max(1, state[kBound]);
  float r0 = 0.0f, r1 = 0.0f;
  if constexpr (kExact) {
    r0 = rows[row];
    r1 = rows[s.n + row];
  }
  const device P* values = product + ulong(row) * s.m;
  const device float* b = bias + s.f0;
  for (uint base = begin; base < end; base += 4 * kSimd) {
    uint at = base + 4 * lane;
    float4 p = float4(0.0f), v = float4(0.0f);
    uint may = 0, bits = 0;
    if constexpr (V == 4) {
      if (at < end) {
        p = load<P, 4>(values + at);
        v = p + load<float, 4>(b + at);
        may = 15;
      }
    } else {
      for (uint i = 0; i < 4; ++i) {
        if (at + i >= end) break;
        p[i] = float(values[at + i]);
        v[i] = p[i] + b[at + i];
        may |= 1u << i;
      }
    }
    int lower[4], upper[4];
    for (uint i = 0; i < 4; ++i) {
      lower[i] = upper[i] = kNoKey;
      if ((may >> i & 1) == 0) continue;
      uint j = s.f0 + at + i;
      lower[i] = upper[i] = order_key(v[i]);
      if constexpr (kExact) {
        if (r1 != 0.0f) {
          float error = r0 * (columns[j] + s.tiny) + r1 * columns[s.d_sae + j] + columns[2 * ulong(s.d_sae) + j] +
                        2.4e-7f * fabs(bias[j]) + s.cut * fabs(p[i]) + s.least;
          bool known = is_finite(v[i]) && error < INFINITY;
          lower[i] = known ? order_key(v[i] - error) : order_key(-INFINITY);
          upper[i] = known ? order_key(v[i] + error) : kNanKey;
        }
      }
      bool takes;
      if constexpr (kBatch)
        takes = upper[i] >= bound;
      else
        takes = upper[i] > order_key(bounds[j]);
      bits |= uint(takes) << i;
    }
    if (!simd_any(bits != 0)) continue;
    uint mine = popcount(bits), place = count + simd_prefix_exclusive_sum(mine);
    count += simd_sum(mine);
    for (uint i = 0; i < 4; ++i) {
      if ((bits >> i & 1) == 0) continue;
      ids[list + place] = s.f0 + at + i;
      low[list + place] = lower[i];
      if constexpr (kExact) up[list + place] = upper[i];
      place += 1;
    }
  }
  if (lane == 0) counts[unit] = count;
}

template <typename P, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_filter_batch(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device uint* ids [[buffer(2)]],
    device int* low [[buffer(3)]], device uint* counts [[buffer(4)]], constant CsrSizes& s [[buffer(5)]],
    const device int* state [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  csr_collect<P, V, false, true>(product, bias, nullptr, state, ids, low, nullptr, counts, nullptr, nullptr, s,
                                 group * simdgroups + simdgroup, lane);
}

template <typename P, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_filter_threshold(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device uint* ids [[buffer(2)]],
    device int* low [[buffer(3)]], device uint* counts [[buffer(4)]], constant CsrSizes& s [[buffer(5)]],
    const device float* bounds [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  csr_collect<P, V, false, false>(product, bias, bounds, nullptr, ids, low, nullptr, counts, nullptr, nullptr, s,
                                  group * simdgroups + simdgroup, lane);
}

template <typename P, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_filter_batch_exact(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device uint* ids [[buffer(2)]],
    device int* low [[buffer(3)]], device uint* counts [[buffer(4)]], constant CsrSizes& s [[buffer(5)]],
    const device int* state [[buffer(6)]], device int* up [[buffer(7)]], const device float* rows [[buffer(8)]],
    const device float* columns [[buffer(9)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  csr_collect<P, V, true, true>(product, bias, nullptr, state, ids, low, up, counts, rows, columns, s,
                                group * simdgroups + simdgroup, lane);
}

template <typename P, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_filter_threshold_exact(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device uint* ids [[buffer(2)]],
    device int* low [[buffer(3)]], device uint* counts [[buffer(4)]], constant CsrSizes& s [[buffer(5)]],
    const device float* bounds [[buffer(6)]], device int* up [[buffer(7)]], const device float* rows [[buffer(8)]],
    const device float* columns [[buffer(9)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  csr_collect<P, V, true, false>(product, bias, bounds, nullptr, ids, low, up, counts, rows, columns, s,
                                 group * simdgroups + simdgroup, lane);
}

constant constexpr uint kSettleSimdgroups = 4, kSettleThreads = kSettleSimdgroups * kSimd;

/** Fresh intervals become float32 results; what does not reach the bound leaves the list. A simdgroup a unit. */
template <typename T, int V, bool kBatch>
METAL_FUNC void csr_settle_unit(const device T* x, const device T* w, const device float* bias, device uint* ids,
                                device int* low, const device int* up, device uint* counts, const device int* state,
                                const device float* bounds, constant CsrSizes& s, threadgroup T* tile,
                                threadgroup T* piece, uint unit, uint lane) {
  if (unit >= s.n * s.parts) return;
  const device T* row = x + ulong(unit / s.parts) * s.d;
  ulong list = ulong(unit) * s.width;
  uint count = 0, kept = 0;
  if (lane == 0) count = counts[unit];  // read by the thread that writes it at the end
  count = simd_broadcast_first(count);
  int bound = 1;
  if constexpr (kBatch) bound = max(1, state[kBound]);
  // What can stay, first: products are made for whole simdgroups of these.
  if constexpr (kBatch) {
    for (uint base = 0; base < count; base += kSimd) {
      uint i = base + lane;
      uint id = 0, stays = 0;
      if (i < count) {
        id = ids[list + i];
        stays = uint(up[list + i] >= bound);
      }
      uint place = kept + simd_prefix_exclusive_sum(stays);
      kept += simd_sum(stays);
      simdgroup_barrier(mem_flags::mem_device);
      if (stays != 0) ids[list + place] = id;
    }
    simdgroup_barrier(mem_flags::mem_device);
    count = kept;
    kept = 0;
  }
  for (uint base = 0; base < count; base += kSimd) {
    uint i = base + lane;
    uint id = ids[list + min(i, count - 1)];
    float result[1];
    chains<T, V, 1>(row, 1, w, id, min(kSimd, count - base), s.d, tile, piece, lane, result);
    int key = order_key(result[0] + bias[id]);
    uint stays = uint(i < count);
    if constexpr (kBatch)
      stays &= uint(key >= bound);
    else
      stays &= uint(key > order_key(bounds[id]));
    uint place = kept + simd_prefix_exclusive_sum(stays);
    kept += simd_sum(stays);
    simdgroup_barrier(mem_flags::mem_device);  // all have read what is overwritten now
    if (stays != 0) {
      ids[list + place] = id;
      low[list + place] = key;
    }
  }
  if (lane == 0) counts[unit] = kept;
}

template <typename T, int V>
[[kernel, max_total_threads_per_threadgroup(kSettleThreads)]] void csr_settle_batch(
    const device T* x [[buffer(0)]], const device T* w [[buffer(1)]], const device float* bias [[buffer(2)]],
    device uint* ids [[buffer(3)]], device int* low [[buffer(4)]], const device int* up [[buffer(5)]],
    device uint* counts [[buffer(6)]], constant CsrSizes& s [[buffer(7)]], const device int* state [[buffer(8)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr uint tile = kSimd * kTileRowBytes / sizeof(T), piece = kPieceBytes / sizeof(T);
  threadgroup T tiles[kSettleSimdgroups * tile];
  threadgroup T pieces[kSettleSimdgroups * piece];
  csr_settle_unit<T, V, true>(x, w, bias, ids, low, up, counts, state, nullptr, s, tiles + simdgroup * tile,
                              pieces + simdgroup * piece, group * kSettleSimdgroups + simdgroup, lane);
}

template <typename T, int V>
[[kernel, max_total_threads_per_threadgroup(kSettleThreads)]] void csr_settle_threshold(
    const device T* x [[buffer(0)]], const device T* w [[buffer(1)]], const device float* bias [[buffer(2)]],
    device uint* ids [[buffer(3)]], device int* low [[buffer(4)]], const device int* up [[buffer(5)]],
    device uint* counts [[buffer(6)]], constant CsrSizes& s [[buffer(7)]], const device float* bounds [[buffer(8)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  constexpr uint tile = kSimd * kTileRowBytes / sizeof(T), piece = kPieceBytes / sizeof(T);
  threadgroup T tiles[kSettleSimdgroups * tile];
  threadgroup T pieces[kSettleSimdgroups * piece];
  csr_settle_unit<T, V, false>(x, w, bias, ids, low, up, counts, nullptr, bounds, s, tiles + simdgroup * tile,
                               pieces + simdgroup * piece, group * kSettleSimdgroups + simdgroup, lane);
}

// ---- the cut: the room-th largest of kept and fresh keys, digit after digit of the 31 bits of a positive key
// ---------

constant constexpr uint kDigitBins = 2048, kDigitThreads = 256;

struct DigitSizes {
  uint units, width, room, first, shift, bits;
};

/** Counts the digits at `shift` of the keys that share the digits above. A few threadgroups for all units. */
[[kernel, max_total_threads_per_threadgroup(kDigitThreads)]] void csr_count_digits(
    const device int* kept [[buffer(0)]], const device uint* offsets [[buffer(1)]], const device int* low [[buffer(2)]],
    const device uint* counts [[buffer(3)]], const device int* state [[buffer(4)]],
    device atomic_uint* bins [[buffer(5)]], constant DigitSizes& s [[buffer(6)]],
    uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup atomic_uint here[kDigitBins];
  bool top = s.shift + s.bits == 31;
  if (!top && state[kAll] != 0) return;
  for (uint i = thread_index; i < kDigitBins; i += kDigitThreads)
    atomic_store_explicit(&here[i], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint digits = top ? 0 : uint(state[kDigits]), mask = (1u << s.bits) - 1, step = kDigitThreads / kSimd;
  for (uint unit = group * step + simdgroup; unit < s.units; unit += groups * step) {
    uint begin = 0, end = 0;
    if (s.first == 0) {
      begin = offsets[unit];
      end = offsets[unit + 1];
    }
    for (uint i = begin + lane; i < end; i += kSimd) {
      uint key = uint(kept[i]);
      if (key >> (s.shift + s.bits) == digits)
        atomic_fetch_add_explicit(&here[(key >> s.shift) & mask], 1u, memory_order_relaxed);
    }
    for (uint i = lane; i < counts[unit]; i += kSimd) {
      int key = low[ulong(unit) * s.width + i];
      if (key > 0 && uint(key) >> (s.shift + s.bits) == digits)
        atomic_fetch_add_explicit(&here[(uint(key) >> s.shift) & mask], 1u, memory_order_relaxed);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < kDigitBins; i += kDigitThreads) {
    uint count = atomic_load_explicit(&here[i], memory_order_relaxed);
    if (count != 0) atomic_fetch_add_explicit(&bins[i], count, memory_order_relaxed);
  }
}

/** Sum over the threads before this one, and of all, by `simdgroups` simdgroups; `pad` has one number for each. */
METAL_FUNC uint group_scan(uint v, threadgroup uint* pad, thread uint& total, uint lane, uint simdgroup,
                           uint simdgroups) {
  uint before = simd_prefix_exclusive_sum(v), sum = simd_sum(v);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // nobody reads the pad any more
  if (lane == 0) pad[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint part = lane < simdgroups ? pad[lane] : 0;
  uint rest = simd_sum(lane < simdgroup ? part : 0);
  total = simd_sum(part);
  return before + rest;
}

/** One threadgroup: the next digit; after the last one the cut and the bound. Leaves the bins empty. */
[[kernel, max_total_threads_per_threadgroup(kDigitThreads)]] void csr_next_digit(
    device uint* bins [[buffer(0)]], device int* state [[buffer(1)]], constant DigitSizes& s [[buffer(2)]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint pad[kDigitThreads / kSimd];
  constexpr uint each = kDigitBins / kDigitThreads;
  bool top = s.shift + s.bits == 31;
  if (!top && state[kAll] != 0) return;
  uint rank = top ? s.room : uint(state[kRank]), digits = top ? 0 : uint(state[kDigits]);
  uint highest = kDigitBins - 1 - thread_index * each, mine = 0, total = 0;
  for (uint i = 0; i < each; ++i) mine += bins[highest - i];
  uint above = group_scan(mine, pad, total, lane, simdgroup, kDigitThreads / kSimd);
  threadgroup_barrier(mem_flags::mem_device);  // all have read the state
  if (total < rank) {
    if (thread_index == 0) {  // fewer than there is room for: all are kept
      state[kAll] = 1;
      state[kCut] = 0;
      state[kEqual] = 0;
      if (s.first != 0) state[kBound] = 1;
    }
  } else if (above < rank && rank <= above + mine) {
    uint bin = highest;
    while (above + bins[bin] < rank) {
      above += bins[bin];
      bin -= 1;
    }
    digits = digits << s.bits | bin;
    state[kDigits] = int(digits);
    state[kRank] = int(rank - above);
    state[kAll] = 0;
    if (s.shift == 0) {
      state[kCut] = int(digits);
      state[kEqual] = int(rank - above);
      state[kBound] = s.first != 0 ? int(digits) : max(state[kBound], int(digits));
    }
  }
  for (uint i = 0; i < each; ++i) bins[highest - i] = 0;
}

/** How many keys of a unit are above the cut and equal to it: tallies [unit][2]. A simdgroup a unit. */
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_tally(
    const device int* kept [[buffer(0)]], const device uint* offsets [[buffer(1)]], const device int* low [[buffer(2)]],
    const device uint* counts [[buffer(3)]], const device int* state [[buffer(4)]], device uint* tallies [[buffer(5)]],
    constant DigitSizes& s [[buffer(6)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  uint unit = group * simdgroups + simdgroup;
  if (unit >= s.units) return;
  int cut = state[kCut];
  uint above = 0, equal = 0, begin = 0, end = 0;
  if (s.first == 0) {
    begin = offsets[unit];
    end = offsets[unit + 1];
  }
  for (uint i = begin + lane; i < end; i += kSimd) {
    above += uint(kept[i] > cut);
    equal += uint(kept[i] == cut);
  }
  for (uint i = lane; i < counts[unit]; i += kSimd) {
    int key = low[ulong(unit) * s.width + i];
    above += uint(key > cut);
    equal += uint(key == cut);
  }
  above = simd_sum(above);
  equal = simd_sum(equal);
  if (lane == 0) {
    tallies[2 * unit] = above;
    tallies[2 * unit + 1] = equal;
  }
}

// ---- the code of all features so far -------------------------------------------------------------------------------

constant constexpr uint kScanThreads = 1024, kScanSimdgroups = kScanThreads / kSimd;

/** One threadgroup: quotas [unit], how many keys equal to the cut a unit keeps, and the offsets of what is kept. */
[[kernel, max_total_threads_per_threadgroup(kScanThreads)]] void csr_scan_batch(
    const device uint* tallies [[buffer(0)]], const device int* state [[buffer(1)]], device uint* quotas [[buffer(2)]],
    device uint* next [[buffer(3)]], constant DigitSizes& s [[buffer(4)]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint pad[kScanSimdgroups];
  uint allowed = uint(state[kEqual]), equals = 0, kept = 0, total = 0;
  for (uint base = 0; base < s.units; base += kScanThreads) {
    uint unit = base + thread_index, above = 0, equal = 0;
    if (unit < s.units) {
      above = tallies[2 * unit];
      equal = tallies[2 * unit + 1];
    }
    uint before = equals + group_scan(equal, pad, total, lane, simdgroup, kScanSimdgroups);
    equals += total;
    uint quota = min(equal, allowed - min(allowed, before));
    uint place = kept + group_scan(above + quota, pad, total, lane, simdgroup, kScanSimdgroups);
    kept += total;
    if (unit >= s.units) continue;
    quotas[unit] = quota;
    next[unit] = place;
  }
  if (thread_index == 0) next[s.units] = kept;
}

/** One threadgroup: the offsets of kept and fresh entries, none beyond the room; their true number goes to `count`. */
[[kernel, max_total_threads_per_threadgroup(kScanThreads)]] void csr_scan_threshold(
    const device uint* offsets [[buffer(0)]], const device uint* counts [[buffer(1)]], device uint* next [[buffer(2)]],
    device long* count [[buffer(3)]], constant DigitSizes& s [[buffer(4)]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint pad[kScanSimdgroups];
  uint entries = 0, total = 0;
  for (uint base = 0; base < s.units; base += kScanThreads) {
    uint unit = base + thread_index, here = 0;
    if (unit < s.units) {
      here = counts[unit];
      if (s.first == 0) here += offsets[unit + 1] - offsets[unit];
    }
    uint place = entries + group_scan(here, pad, total, lane, simdgroup, kScanSimdgroups);
    entries += total;
    if (unit < s.units) next[unit] = min(place, s.room);
  }
  if (thread_index != 0) return;
  next[s.units] = min(entries, s.room);
  // What was kept before is counted already, be it dropped or not.
  count[0] = s.first != 0 ? long(entries) : count[0] + long(entries - offsets[s.units]);
}

/** A simdgroup writes a unit's entries: the kept ones, whose features are lower, then the fresh ones. */
template <bool kBatch>
METAL_FUNC void csr_merge_unit(const device uint* ids, const device int* keys, const device uint* offsets,
                               const device uint* fresh_ids, const device int* fresh_keys, const device uint* counts,
                               const device int* state, const device uint* quotas, const device uint* next,
                               device uint* next_ids, device int* next_keys, constant DigitSizes& s, uint unit,
                               uint lane) {
  if (unit >= s.units) return;
  uint begin = 0, kept = 0, to = next[unit], end = next[unit + 1], equals = 0, quota = 0;
  int cut = 0;
  if constexpr (kBatch) {
    cut = state[kCut];
    quota = quotas[unit];
  }
  if (s.first == 0) {
    begin = offsets[unit];
    kept = offsets[unit + 1] - begin;
  }
  uint count = kept + counts[unit];
  for (uint base = 0; base < count && to < end; base += kSimd) {
    uint i = base + lane, id = 0;
    int key = 0;
    if (i < kept) {
      id = ids[begin + i];
      key = keys[begin + i];
    } else if (i < count) {
      ulong from = ulong(unit) * s.width + (i - kept);
      id = fresh_ids[from];
      key = fresh_keys[from];
    }
    uint keep = uint(i < count);
    if constexpr (kBatch) {
      uint equal = uint(i < count && key == cut);
      uint before = equals + simd_prefix_exclusive_sum(equal);
      equals += simd_sum(equal);
      keep = uint(i < count && (key > cut || (key == cut && before < quota)));
    }
    uint place = to + simd_prefix_exclusive_sum(keep);
    to += simd_sum(keep);
    if (keep == 0 || place >= end) continue;
    next_ids[place] = id;
    next_keys[place] = key;
  }
}

[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_merge_batch(
    const device uint* ids [[buffer(0)]], const device int* keys [[buffer(1)]],
    const device uint* offsets [[buffer(2)]], const device uint* fresh_ids [[buffer(3)]],
    const device int* fresh_keys [[buffer(4)]], const device uint* counts [[buffer(5)]],
    const device uint* next [[buffer(6)]], device uint* next_ids [[buffer(7)]], device int* next_keys [[buffer(8)]],
    constant DigitSizes& s [[buffer(9)]], const device int* state [[buffer(10)]],
    const device uint* quotas [[buffer(11)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  csr_merge_unit<true>(ids, keys, offsets, fresh_ids, fresh_keys, counts, state, quotas, next, next_ids, next_keys, s,
                       group * simdgroups + simdgroup, lane);
}

[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_merge_threshold(
    const device uint* ids [[buffer(0)]], const device int* keys [[buffer(1)]],
    const device uint* offsets [[buffer(2)]], const device uint* fresh_ids [[buffer(3)]],
    const device int* fresh_keys [[buffer(4)]], const device uint* counts [[buffer(5)]],
    const device uint* next [[buffer(6)]], device uint* next_ids [[buffer(7)]], device int* next_keys [[buffer(8)]],
    constant DigitSizes& s [[buffer(9)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  csr_merge_unit<false>(ids, keys, offsets, fresh_ids, fresh_keys, counts, nullptr, nullptr, next, next_ids, next_keys,
                        s, group * simdgroups + simdgroup, lane);
}

[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_clear(device uint* bins [[buffer(0)]],
                                                                          uint i [[thread_position_in_grid]]) {
  bins[i] = 0;
}

// ---- the end -------------------------------------------------------------------------------------------------------

struct WriteSizes {
  uint n, parts, room, empty;  // empty: there is nothing to read
};

/** values, indices [room] and offsets [n + 1]; a thread for each. Entries in no row become 0. */
template <typename O>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_write(
    const device uint* ids [[buffer(0)]], const device int* keys [[buffer(1)]],
    const device uint* offsets [[buffer(2)]], device O* values [[buffer(3)]], device uint* indices [[buffer(4)]],
    device long* ends [[buffer(5)]], constant WriteSizes& s [[buffer(6)]], uint i [[thread_position_in_grid]]) {
  uint count = s.empty != 0 ? 0 : offsets[s.n * s.parts];
  if (i < s.room) {
    values[i] = i < count ? O(key_value(keys[i])) : O(0.0f);
    indices[i] = i < count ? ids[i] : 0;
  }
  if (i <= s.n) ends[i] = s.empty != 0 ? 0 : long(offsets[i * s.parts]);
}

/** One threadgroup: the smallest value that is kept, 0 where nothing is. */
[[kernel, max_total_threads_per_threadgroup(kScanThreads)]] void csr_least(
    const device int* keys [[buffer(0)]], const device uint* offsets [[buffer(1)]],
    const device int* state [[buffer(2)]], device float* least [[buffer(3)]], constant WriteSizes& s [[buffer(4)]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup int pad[kScanSimdgroups];
  uint count = s.empty != 0 ? 0 : offsets[s.n * s.parts];
  int key = kNanKey;
  if (count != 0 && state[kAll] == 0)
    key = state[kCut];
  else
    for (uint i = thread_index; i < count; i += kScanThreads) key = min(key, keys[i]);
  key = simd_min(key);
  if (lane == 0) pad[simdgroup] = key;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index != 0) return;
  for (uint i = 0; i < kScanSimdgroups; ++i) key = min(key, pad[i]);
  least[0] = count == 0 ? 0.0f : key_value(key);
}

/** The number of entries where there are no rows. */
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void csr_no_entries(device long* count [[buffer(0)]]) {
  count[0] = 0;
}
