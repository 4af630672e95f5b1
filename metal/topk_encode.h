#pragma once
// The k largest pre-activations of each row, from a product that is made chunk after chunk of features.
//
// A row keeps a list of candidates in ascending order of the feature. A candidate is an interval of keys that holds
// its float32 result (common/chain.h): the bound of csrc/cpu/kernel_screen.h where the product is of low precision
// ("exact"), else the product itself, an interval of no width. The k-th largest lower end seen so far is a bound that
// only grows; what does not reach it with its upper end can never be selected. A full list is cut by that rule; where
// too many intervals overlap for that, they are settled: replaced by their float32 results. Nothing is ever dropped.

#include "common/chain.h"
#include "common/select.h"

struct FilterSizes {
  uint n, m, f0;      // the product is [n, m], of the features from f0 on
  uint parts, width;  // lists of a row; features of a part, a multiple of 4
  uint k, capacity, k_aux, capacity_aux;
  uint d;
  uint first;        // 1 at the first chunk
  float cut, least;  // rounding of the product's own type: relative, absolute
  float tiny;        // what squares that vanish may hide from a norm
};

/** A list, in the hands of one simdgroup; all but the buffers' contents is the same in every thread. */
struct Candidates {
  device int* ids;
  device int* low;
  device int* up;
  uint k, capacity, count;
  int bound;
};

/** Lists lie [unit][ids, low, up][capacity]; their states [unit][count, bound]. */
METAL_FUNC void open_list(thread Candidates& l, device int* lists, const device int* states, uint unit, uint k,
                          uint capacity, bool first, uint lane) {
  l.ids = lists + ulong(unit) * 3 * capacity;
  l.low = l.ids + capacity;
  l.up = l.low + capacity;
  l.k = k;
  l.capacity = capacity;
  int count = 0, bound = kNoKey;
  if (lane == 0 && !first) {  // read by the thread that writes it in close_list
    count = states[2 * ulong(unit)];
    bound = states[2 * ulong(unit) + 1];
  }
  l.count = uint(simd_broadcast_first(count));
  l.bound = simd_broadcast_first(bound);
}

METAL_FUNC void close_list(thread const Candidates& l, device int* states, uint unit, uint lane) {
  if (lane == 0) {
    states[2 * ulong(unit)] = int(l.count);
    states[2 * ulong(unit) + 1] = l.bound;
  }
}

/** Drops what k others surely beat: a larger lower end, or an equal one at a lower feature. */
METAL_FUNC void cut(thread Candidates& l, uint lane) {
  simdgroup_barrier(mem_flags::mem_device);
  if (l.count < l.k) return;
  int bound = kth_largest(l.low, l.count, l.k, lane);
  uint larger = 0;
  for (uint i = lane; i < l.count; i += kSimd) larger += uint(l.low[i] > bound);
  uint beats = simd_sum(larger), kept = 0;  // beats: those that surely beat an upper end at the bound
  for (uint base = 0; base < l.count; base += kSimd) {
    uint i = base + lane;
    bool there = i < l.count;
    int id = 0, low = kNoKey, up = kNoKey;
    if (there) {
      id = l.ids[i];
      low = l.low[i];
      up = l.up[i];
    }
    uint equal = uint(there && low == bound);
    uint before = beats + simd_prefix_exclusive_sum(equal);
    uint keep = uint(there && (up > bound || (up == bound && before < l.k)));
    uint place = kept + simd_prefix_exclusive_sum(keep);
    beats += simd_sum(equal);
    kept += simd_sum(keep);
    simdgroup_barrier(mem_flags::mem_device);  // all have read what is overwritten now
    if (keep != 0) {
      l.ids[place] = id;
      l.low[place] = low;
      l.up[place] = up;
    }
  }
  simdgroup_barrier(mem_flags::mem_device);
  l.count = kept;
  l.bound = max(l.bound, bound);
}

/** Every interval becomes its float32 result. */
template <typename T>
METAL_FUNC void settle(thread const Candidates& l, const device T* x, const device T* w, const device float* bias,
                       uint d, uint lane) {
  for (uint i = lane; i < l.count; i += kSimd) {
    if (l.low[i] == l.up[i]) continue;
    uint id = uint(l.ids[i]);
    int key = order_key(chain(x, w + ulong(id) * d, d) + bias[id]);
    l.low[i] = key;
    l.up[i] = key;
  }
}

/** Those of four candidates whose upper end is above the bound, one bit each. */
METAL_FUNC uint above(int bound, thread const int* up, uint may) {
  uint bits = 0;
  for (uint i = 0; i < 4; ++i) bits |= uint(up[i] > bound) << i;
  return bits & may;
}

/** Appends four candidates of each thread, features id to id + 3; false where there is no room. */
METAL_FUNC bool append(thread Candidates& l, uint bits, uint id, thread const int* low, thread const int* up) {
  uint mine = popcount(bits), place = l.count + simd_prefix_exclusive_sum(mine), total = simd_sum(mine);
  if (l.count + total > l.capacity) return false;
  for (uint i = 0; i < 4; ++i) {
    if ((bits >> i & 1) == 0) continue;
    l.ids[place] = int(id + i);
    l.low[place] = low[i];
    l.up[place] = up[i];
    place += 1;
  }
  l.count += total;
  return true;
}

template <typename T, bool kExact>
METAL_FUNC void offer(thread Candidates& l, uint may, uint id, thread const int* low, thread const int* up,
                      const device T* x, const device T* w, const device float* bias, uint d, uint lane) {
  uint bits = above(l.bound, up, may);
  if (!simd_any(bits != 0) || append(l, bits, id, low, up)) return;
  cut(l, lane);
  bits = above(l.bound, up, may);
  if (append(l, bits, id, low, up)) return;
  if constexpr (kExact) {
    settle(l, x, w, bias, d, lane);
    cut(l, lane);
    append(l, above(l.bound, up, may), id, low, up);
  }
}

/** What a value must exceed to be looked at more closely, where results are at most `error` above the product. */
METAL_FUNC float coarse(int bound, float error) {
  float b = key_value(bound);
  return error == 0.0f ? b : b - error - fabs(b) * 2.4e-7f;
}

/**
 * One simdgroup filters one part of one row of a chunk. rows [2, n], columns [3, d_sae] and edge [4], the largest of
 * this chunk's columns and biases, are those of the error bound.
 */
template <typename P, typename T, int V, bool kExact, bool kAux>
METAL_FUNC void filter(const device P* product, const device float* bias, device int* lists, device int* states,
                       const device bool* mask, device int* aux_lists, device int* aux_states, const device T* x,
                       const device T* w, const device float* rows, const device float* columns,
                       const device float* edge, uint d_sae, constant FilterSizes& s, uint unit, uint lane) {
  if (unit >= s.n * s.parts) return;
  uint row = unit / s.parts, begin = unit % s.parts * s.width, end = min(s.m, begin + s.width);
  Candidates main, aux;
  open_list(main, lists, states, unit, s.k, s.capacity, s.first != 0, lane);
  if constexpr (kAux) open_list(aux, aux_lists, aux_states, unit, s.k_aux, s.capacity_aux, s.first != 0, lane);

  float r0 = 0.0f, r1 = 0.0f, most = 0.0f;
  const device T* x_row = x;
  if constexpr (kExact) {
    x_row = x + ulong(row) * s.d;
    r0 = rows[row];
    r1 = rows[s.n + row];
    // A row of zeros has the bias as its exact result.
    if (r1 != 0.0f) most = r0 * (edge[0] + s.tiny) + r1 * edge[1] + edge[2] + 2.4e-7f * edge[3] + s.least;
    if (!(most < INFINITY)) most = INFINITY;
  }
  float limit = coarse(main.bound, most), aux_limit = 0.0f;
  if constexpr (kAux) aux_limit = coarse(aux.bound, most);

  const device P* values = product + ulong(row) * s.m;
  const device float* b = bias + s.f0;
  for (uint base = begin; base < end; base += 4 * kSimd) {
    uint at = base + 4 * lane;
    float4 p = float4(0.0f), q = float4(0.0f);  // products and biases
    uint may = 0, wanted = 0;
    if constexpr (V == 4) {
      if (at < end) {  // m is a multiple of 4
        p = load<P, 4>(values + at);
        q = load<float, 4>(b + at);
        may = 15;
      }
    } else {
      for (uint i = 0; i < 4; ++i) {
        if (at + i >= end) break;
        p[i] = float(values[at + i]);
        q[i] = b[at + i];
        may |= 1u << i;
      }
    }
    float4 v = p + q;
    bool close = false;
    for (uint i = 0; i < 4; ++i) {
      bool here = (may >> i & 1) != 0;
      float slack = 0.0f;
      if constexpr (kExact) slack = s.cut * fabs(p[i]);
      close = close || (here && !(v[i] + slack <= limit));
      if constexpr (kAux) {
        if (here && mask[s.f0 + at + i]) {
          wanted |= 1u << i;
          close = close || !(v[i] + slack <= aux_limit);
        }
      }
    }
    if (!simd_any(close)) continue;

    float4 c0 = float4(0.0f), c1 = float4(0.0f), c2 = float4(0.0f);  // columns
    if constexpr (kExact) {
      const device float* c = columns + s.f0 + at;
      if (V == 4 && d_sae % 4 == 0) {
        if (may != 0) {
          c0 = load<float, 4>(c);
          c1 = load<float, 4>(c + d_sae);
          c2 = load<float, 4>(c + 2 * ulong(d_sae));
        }
      } else {
        for (uint i = 0; i < 4; ++i) {
          if ((may >> i & 1) == 0) continue;
          c0[i] = c[i];
          c1[i] = c[d_sae + i];
          c2[i] = c[2 * ulong(d_sae) + i];
        }
      }
    }
    int low[4], up[4];
    for (uint i = 0; i < 4; ++i) {
      low[i] = up[i] = kNoKey;
      if ((may >> i & 1) == 0) continue;
      low[i] = up[i] = order_key(v[i]);
      if constexpr (kExact) {
        if (r1 == 0.0f) continue;
        float error = r0 * (c0[i] + s.tiny) + r1 * c1[i] + c2[i] + 2.4e-7f * fabs(q[i]) + s.cut * fabs(p[i]) + s.least;
        bool known = is_finite(v[i]) && error < INFINITY;
        low[i] = known ? order_key(v[i] - error) : order_key(-INFINITY);
        up[i] = known ? order_key(v[i] + error) : kNanKey;
      }
    }
    offer<T, kExact>(main, may, s.f0 + at, low, up, x_row, w, bias, s.d, lane);
    limit = coarse(main.bound, most);
    if constexpr (kAux) {
      offer<T, kExact>(aux, wanted, s.f0 + at, low, up, x_row, w, bias, s.d, lane);
      aux_limit = coarse(aux.bound, most);
    }
  }
  close_list(main, states, unit, lane);
  if constexpr (kAux) close_list(aux, aux_states, unit, lane);
}

template <typename P, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void topk_filter(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device int* lists [[buffer(2)]],
    device int* states [[buffer(3)]], constant FilterSizes& s [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  filter<P, P, V, false, false>(product, bias, lists, states, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                nullptr, nullptr, 0, s, group * simdgroups + simdgroup, lane);
}

template <typename P, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void topk_filter_aux(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device int* lists [[buffer(2)]],
    device int* states [[buffer(3)]], constant FilterSizes& s [[buffer(4)]], const device bool* mask [[buffer(5)]],
    device int* aux_lists [[buffer(6)]], device int* aux_states [[buffer(7)]],
    uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  filter<P, P, V, false, true>(product, bias, lists, states, mask, aux_lists, aux_states, nullptr, nullptr, nullptr,
                               nullptr, nullptr, 0, s, group * simdgroups + simdgroup, lane);
}

template <typename P, typename T, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void topk_filter_exact(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device int* lists [[buffer(2)]],
    device int* states [[buffer(3)]], constant FilterSizes& s [[buffer(4)]], const device T* x [[buffer(8)]],
    const device T* w [[buffer(9)]], const device float* rows [[buffer(10)]],
    const device float* columns [[buffer(11)]], const device float* edge [[buffer(12)]],
    constant uint& d_sae [[buffer(13)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  filter<P, T, V, true, false>(product, bias, lists, states, nullptr, nullptr, nullptr, x, w, rows, columns, edge,
                               d_sae, s, group * simdgroups + simdgroup, lane);
}

template <typename P, typename T, int V>
[[kernel, max_total_threads_per_threadgroup(kMaxThreads)]] void topk_filter_exact_aux(
    const device P* product [[buffer(0)]], const device float* bias [[buffer(1)]], device int* lists [[buffer(2)]],
    device int* states [[buffer(3)]], constant FilterSizes& s [[buffer(4)]], const device bool* mask [[buffer(5)]],
    device int* aux_lists [[buffer(6)]], device int* aux_states [[buffer(7)]], const device T* x [[buffer(8)]],
    const device T* w [[buffer(9)]], const device float* rows [[buffer(10)]],
    const device float* columns [[buffer(11)]], const device float* edge [[buffer(12)]],
    constant uint& d_sae [[buffer(13)]], uint group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  filter<P, T, V, true, true>(product, bias, lists, states, mask, aux_lists, aux_states, x, w, rows, columns, edge,
                              d_sae, s, group * simdgroups + simdgroup, lane);
}

// ---- the end: from the lists of a row to its code -------------------------------------------------------------------

struct FinishSizes {
  uint parts, k, capacity, d;
};

constant constexpr uint kFinishThreads = 128, kFinishSimdgroups = kFinishThreads / kSimd;

/** Ranks of the threads that keep something, over the threadgroup; `pad` holds 2 * kFinishSimdgroups numbers. */
METAL_FUNC uint group_rank(uint keep, threadgroup uint* pad, thread uint& turn, thread uint& total, uint lane,
                           uint simdgroup) {
  threadgroup uint* mine = pad + (turn & 1) * kFinishSimdgroups;  // halves take turns: one barrier is enough
  turn += 1;
  uint rank = simd_prefix_exclusive_sum(keep), sum = simd_sum(keep);
  if (lane == 0) mine[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  total = 0;
  for (uint i = 0; i < kFinishSimdgroups; ++i) {
    if (i == simdgroup) rank += total;
    total += mine[i];
  }
  return rank;
}

/**
 * A threadgroup for each row: candidates of all parts, cut; float32 results of what is left; the k largest of these,
 * ascending by feature. `stage` [n][id, key][parts * capacity].
 */
template <typename T, typename O, int V, bool kExact>
[[kernel, max_total_threads_per_threadgroup(kFinishThreads)]] void topk_finish(
    const device int* lists [[buffer(0)]], const device int* states [[buffer(1)]], device int* stage [[buffer(2)]],
    device O* values [[buffer(3)]], device uint* indices [[buffer(4)]], constant FinishSizes& s [[buffer(5)]],
    const device T* x [[buffer(6)]], const device T* w [[buffer(7)]], const device float* bias [[buffer(8)]],
    uint row [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup atomic_uint bins[kBins];
  threadgroup uint pad[2 * kFinishSimdgroups];
  threadgroup T tiles[kExact ? kFinishSimdgroups * kSimd * kTileRowBytes / sizeof(T) : 1];
  threadgroup T pieces[kExact ? kFinishSimdgroups * kPieceBytes / sizeof(T) : 1];
  uint turn = 0, total = 0;
  const device int* list = lists + ulong(row) * s.parts * 3 * s.capacity;
  const device int* state = states + ulong(row) * s.parts * 2;
  device int* ids = stage + ulong(row) * s.parts * s.capacity * 2;
  device int* keys = ids + ulong(s.parts) * s.capacity;

  uint candidates = 0;
  for (uint p = 0; p < s.parts; ++p) candidates += uint(state[2 * p]);
  Search search;
  search.digits = 0;
  search.rank = s.k;
  for (int shift = 24; shift >= 0 && candidates > s.k; shift -= 8) {
    clear_bins(bins, thread_index, kFinishThreads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint p = 0; p < s.parts; ++p)
      for (uint i = thread_index; i < uint(state[2 * p]); i += kFinishThreads)
        count_key(bins, search, list[(3 * p + 1) * ulong(s.capacity) + i], uint(shift));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    next_digit(bins, search, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // As in cut(); search.rank is now the number of candidates at the bound that are among the k.
  int bound = candidates > s.k ? signed_key(search.digits) : kNoKey;
  uint beats = s.k - search.rank, kept = 0;
  for (uint p = 0; p < s.parts; ++p) {
    uint count = uint(state[2 * p]);
    const device int* part = list + 3 * p * ulong(s.capacity);
    for (uint base = 0; base < count; base += kFinishThreads) {
      uint i = base + thread_index;
      bool there = i < count;
      int id = 0, low = kNoKey, up = kNoKey;
      if (there) {
        id = part[i];
        low = part[s.capacity + i];
        up = part[2 * ulong(s.capacity) + i];
      }
      uint equal = uint(there && low == bound);
      uint before = beats + group_rank(equal, pad, turn, total, lane, simdgroup);
      beats += total;
      uint keep = uint(there && (up > bound || (up == bound && before < s.k)));
      uint place = kept + group_rank(keep, pad, turn, total, lane, simdgroup);
      kept += total;
      if (keep == 0) continue;
      ids[place] = id;
      keys[place] = low;
    }
  }
  threadgroup_barrier(mem_flags::mem_device);

  if constexpr (kExact) {
    constexpr uint tile = kSimd * kTileRowBytes / sizeof(T), piece = kPieceBytes / sizeof(T);
    for (uint base = simdgroup * kSimd; base < kept; base += kFinishThreads) {
      uint id = base + lane < kept ? uint(ids[base + lane]) : uint(ids[base]);
      float result[1];
      chains<T, V, 1>(x + ulong(row) * s.d, 1, w, id, min(kSimd, kept - base), s.d, tiles + simdgroup * tile,
                      pieces + simdgroup * piece, lane, result);
      // From here on every thread reads the keys that it writes here only.
      if (base + lane < kept) keys[base + lane] = order_key(result[0] + bias[id]);
    }
  }

  device O* row_values = values + ulong(row) * s.k;
  device uint* row_indices = indices + ulong(row) * s.k;
  if (kept < s.k) {
    // Fewer features than slots: the lowest features that are not there fill them, with value 0.
    uint missing = s.k - kept;
    for (uint i = thread_index; i < s.k; i += kFinishThreads) {
      row_values[i] = O(0.0f);
      row_indices[i] = i;
    }
    threadgroup_barrier(mem_flags::mem_device);
    for (uint i = thread_index; i < kept; i += kFinishThreads) {
      uint id = uint(ids[i]), place = min(id, missing + i);
      row_values[place] = O(relu(key_value(keys[i])));
      row_indices[place] = id;
    }
    return;
  }
  search.digits = 0;
  search.rank = s.k;
  for (int shift = 24; shift >= 0 && kept > s.k; shift -= 8) {
    clear_bins(bins, thread_index, kFinishThreads);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index; i < kept; i += kFinishThreads) count_key(bins, search, keys[i], uint(shift));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    next_digit(bins, search, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  bound = kept > s.k ? signed_key(search.digits) : kNoKey;
  uint equals = 0, out = 0;
  for (uint base = 0; base < kept; base += kFinishThreads) {
    uint i = base + thread_index;
    int key = i < kept ? keys[i] : kNoKey;
    uint equal = uint(i < kept && key == bound);
    uint before = equals + group_rank(equal, pad, turn, total, lane, simdgroup);
    equals += total;
    uint keep = uint(i < kept && (key > bound || (key == bound && before < search.rank)));
    uint place = out + group_rank(keep, pad, turn, total, lane, simdgroup);
    out += total;
    if (keep == 0) continue;
    row_values[place] = O(relu(key_value(key)));
    row_indices[place] = uint(ids[i]);
  }
}
