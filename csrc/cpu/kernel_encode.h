#pragma once
// Fused encode: a register-tiled matrix product whose tiles are filtered before they leave the registers.
//
// Tokens lie in the lanes, so a block of tokens is packed once to [panel][d][panel width] and the weights are read as
// they are, one feature a row. A pre-activation is one chain of fused multiply-adds over ascending coordinates,
// followed by the bias: this order is the definition of "the float32 result" and the same on every instruction set
// with fused multiply-add, so that every one of them selects the same features.
//
// Each token keeps a list of candidates and the k-th largest value of the features seen so far. That value can only
// grow, so a pre-activation that does not exceed it can never be selected, nor can an equal one, since features come
// in ascending order and ties go to the lowest. A full list is cut down to its k largest.
//
// NaN counts as larger than everything, and is caught by comparing with "not <=".

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace mlxsae::cpu::MLXSAE_ISA {

/** Memory of a task that is kept for the next one of the same thread. */
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(int64_t n) {
    size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw_bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

template <class F>
MLXSAE_INLINE void with_type(Type type, F&& f) {
  switch (type) {
    case Type::f32:
      return f(float{});
    case Type::f16:
      return f(f16{});
    case Type::bf16:
      return f(bf16{});
  }
}

// Order-preserving integers: key(a) < key(b) iff a < b; both zeros are one; NaN is the largest.
constexpr int32_t kNanKey = INT32_MAX;

MLXSAE_INLINE int32_t to_key(float v) {
  if (v != v) return kNanKey;
  v += 0.0f;  // -0 becomes +0
  int32_t b;
  std::memcpy(&b, &v, 4);
  return b ^ ((b >> 31) & 0x7fffffff);
}
MLXSAE_INLINE float from_key(int32_t k) {
  int32_t b = k ^ ((k >> 31) & 0x7fffffff);
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}

MLXSAE_INLINE int32_t count_ge(const int32_t* keys, int64_t m, int32_t bound) {
  vi b = splat(bound);
#if defined(__AVX512F__)
  int32_t n = 0;
  for (int64_t i = 0; i < m; i += kLanes)
    n += __builtin_popcount(_mm512_cmpge_epi32_mask((__m512i)load(keys + i), (__m512i)b));
  return n;
#else
  vi c{};
  for (int64_t i = 0; i < m; i += kLanes) c -= load(keys + i) >= b;
  return sum(c);
#endif
}

/**
 * The k-th largest of m keys (1 <= k <= m), by bisection, which begins at `least` where it is not larger. `keys` must
 * be readable and writable up to a multiple of the lanes.
 */
inline int32_t kth_largest(int32_t* keys, int64_t m, int64_t k, int32_t least = INT32_MIN) {
  int64_t padded = (m + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = m; i < padded; ++i) keys[i] = INT32_MIN;
  vi lo_v = load(keys), hi_v = lo_v;
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    vi q = load(keys + i);
    hi_v = q > hi_v ? q : hi_v;
  }
  int64_t hi = INT32_MIN, lo = INT32_MIN;
  for (int i = 0; i < kLanes; ++i) hi = hi_v[i] > hi ? hi_v[i] : hi;
  if (least > INT32_MIN && count_ge(keys, padded, least) >= k) lo = least;
  // count(>= lo) >= k > count(>= hi + 1); narrow [lo, hi] to one key
  while (lo < hi) {
    int64_t mid = lo + (hi - lo + 1) / 2;
    int32_t c = count_ge(keys, padded, static_cast<int32_t>(mid));
    if (c == k) {  // mid separates: the answer is the smallest key above it
      vi best = splat(INT32_MAX), b = splat(static_cast<int32_t>(mid));
      for (int64_t i = 0; i < padded; i += kLanes) {
        vi q = load(keys + i);
        vi r = q >= b ? q : best;
        best = r < best ? r : best;
      }
      int32_t s = INT32_MAX;
      for (int i = 0; i < kLanes; ++i) s = best[i] < s ? best[i] : s;
      return s;
    }
    if (c > k)
      lo = mid;
    else
      hi = mid - 1;
  }
  return static_cast<int32_t>(lo);
}

/** Keeps the k largest of m candidates in their order, of equal ones the first. Returns the k-th largest key. */
inline int32_t keep_largest(int32_t* keys, int32_t* ids, int64_t m, int64_t k) {
  int32_t bound = kth_largest(keys, m, k);
  int64_t above = 0;
  for (int64_t i = 0; i < m; ++i) above += keys[i] > bound;
  int64_t equal = k - above, o = 0;
  for (int64_t i = 0; i < m; ++i) {
    int32_t key = keys[i], id = ids[i];
    bool take = key > bound;
    if (key == bound && equal > 0) take = true, --equal;
    keys[o] = key;
    ids[o] = id;
    o += take;
  }
  return bound;
}

/** Candidate lists of the tokens of one block. */
struct Lists {
  int32_t* keys;  // [tokens, stride]
  int32_t* ids;
  int32_t* counts;  // [tokens]
  float* bound;     // [tokens] the filter: a candidate must not be <= it
  int64_t stride;
  int64_t k, limit;  // how many are kept, and at how many a list is cut down

  void keep(int64_t k_, int64_t f_total) {
    k = k_;
    limit = 3 * k + 16 < f_total ? 3 * k + 16 : f_total;
  }
  __attribute__((noinline)) void cut(int64_t t) {
    if (counts[t] < k) return;
    int32_t b = keep_largest(keys + t * stride, ids + t * stride, counts[t], k);
    counts[t] = static_cast<int32_t>(k);
    bound[t] = from_key(b);
  }
  MLXSAE_INLINE vf bound_of(int64_t t, int32_t) const { return load(bound + t); }
  MLXSAE_INLINE void add(int64_t t, float v, int32_t feature) {
    int64_t c = counts[t]++;
    keys[t * stride + c] = to_key(v);
    ids[t * stride + c] = feature;
    if (c + 1 >= limit) cut(t);
  }
};

/** Hands to `to` what exceeds its bounds, of one feature's pre-activations of NV vectors of tokens. */
template <int NV, class To>
__attribute__((noinline)) void emit(To& to, int64_t t0, int32_t feature, const vf* a) {
  for (int v = 0; v < NV; ++v) {
    uint32_t mask = not_le(a[v], to.bound_of(t0 + v * kLanes, feature));
    while (mask) {
      int lane = __builtin_ctz(mask);
      mask &= mask - 1;
      to.add(t0 + v * kLanes + lane, a[v][lane], feature);
    }
  }
}

/** What is kept of each token: the code, and where features are masked a second one over those alone. */
struct Selection {
  Lists main, aux;
  const bool* mask;  // [d_sae] or null

  MLXSAE_INLINE vf bound_of(int64_t t, int32_t feature) const { return main.bound_of(t, feature); }
  MLXSAE_INLINE bool masked(int32_t feature) const { return mask && mask[feature]; }
  template <int NV>
  MLXSAE_INLINE void take(bool any, bool masked, int64_t t0, int32_t feature, const vf* row) {
    if (any) emit<NV>(main, t0, feature, row);
    if (masked) emit<NV>(aux, t0, feature, row);
  }
};

/** Every pre-activation above a bound, handed out one by one (Above). */
struct Hits {
  const Above& e;
  int64_t n;  // tokens; lanes past them are padding

  MLXSAE_INLINE vf bound_of(int64_t, int32_t feature) const { return splat(e.bounds ? e.bounds[feature] : e.bound); }
  MLXSAE_INLINE bool masked(int32_t) const { return false; }
  MLXSAE_INLINE void add(int64_t t, float v, int32_t feature) {
    if (t < n) e.take(e.self, e.t0 + t, feature, v);
  }
  template <int NV>
  MLXSAE_INLINE void take(bool, bool, int64_t t0, int32_t feature, const vf* row) {
    emit<NV>(*this, t0, feature, row);
  }
};

/**
 * MR features x (NV * lanes) tokens over `depth` coordinates: product, and where it is complete bias and filter.
 *
 * Inputs that are too wide for the cache come in several depths; `carry` [MR][NV * lanes] then holds the sums between
 * them, so that the chain of additions is that of one pass. Not inlined: it needs all registers. `ahead`: rows that
 * will be needed next, or null.
 */
template <int MR, int NV, bool kFirst, bool kLast, class S>
__attribute__((noinline)) void tile(const float* w, int64_t ldw, const float* panel, int64_t depth, const float* bias,
                                    const float* ahead, float* carry, S& out, int64_t t0, int32_t feature) {
  vf acc[MR][NV];
  MLXSAE_UNROLL for (int i = 0; i < MR; ++i) {
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = kFirst ? vf{} : load(carry + (i * NV + v) * kLanes);
  }
  auto multiply_add = [&](int64_t c) __attribute__((always_inline)) {
    vf b[NV];
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) b[v] = load(panel + c * (NV * kLanes) + v * kLanes);
    MLXSAE_UNROLL for (int i = 0; i < MR; ++i) {
      vf a = splat(w[i * ldw + c]);
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] += a * b[v];
    }
  };
  int64_t c = 0;
  for (; c + 16 <= depth; c += 16) {  // one cache line of each row
    if (ahead) {
      MLXSAE_UNROLL for (int i = 0; i < MR; ++i) prefetch(ahead + i * ldw + c);
    }
    _Pragma("GCC unroll 4") for (int q = 0; q < 16; ++q) multiply_add(c + q);
  }
  if constexpr (kLast)  // every other depth is whole cache lines
    for (; c < depth; ++c) multiply_add(c);

  if constexpr (!kLast) {
    MLXSAE_UNROLL for (int i = 0; i < MR; ++i) {
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) store(carry + (i * NV + v) * kLanes, acc[i][v]);
    }
    return;
  }
  MLXSAE_UNROLL for (int i = 0; i < MR; ++i) {
    bool any = false;
    if (bias) {
      vf b = splat(bias[feature + i]);
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] += b;
    }
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) any |= any_not_le(acc[i][v], out.bound_of(t0 + v * kLanes, feature + i));
    bool masked = out.masked(feature + i);
    if (__builtin_expect(any | masked, 0)) {
      vf row[NV];  // a copy: the accumulators themselves have no address, or they would leave the registers
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) row[v] = acc[i][v];
      out.template take<NV>(any, masked, t0, feature + i, row);
    }
  }
}

/** Tokens, given by number, to [panel][d][width]; missing ones of the last panel become zeros. */
template <int W, class T>
inline void pack(const T* x, int64_t d, const int64_t* tokens, int64_t n, float* out) {
  for (int64_t p = 0; p * W < n; ++p, out += W * d) {
    int64_t m = n - p * W < W ? n - p * W : W;
    for (int64_t c0 = 0; c0 < d; c0 += 16) {  // a cache line of each token at a time
      int64_t c1 = c0 + 16 < d ? c0 + 16 : d;
      for (int64_t l = 0; l < m; ++l) {
        const T* row = x + tokens[p * W + l] * d;
        for (int64_t c = c0; c < c1; ++c) out[c * W + l] = to_float(row[c]);
      }
    }
    if (m < W)
      for (int64_t c = 0; c < d; ++c)
        for (int64_t l = m; l < W; ++l) out[c * W + l] = 0;
  }
}

// A panel of tokens must stay in the second-level cache with room for the weights: 64 tokens of 2048 coordinates.
constexpr int64_t kDepth = 2048;
constexpr int64_t kCarried = 240;  // features whose sums are carried at a time; a multiple of every MR

/** The packed tokens of a task, and room for what is made of the weights. */
struct Block {
  const float* packed;  // [panels][d][width]
  int64_t panels, d;
  float* converted;  // [MR][d], for weights that are not float32
  float* carry;      // [kCarried][width], for wide inputs
};

/** MR features against every panel. */
template <int MR, int NV, class TW, class S>
MLXSAE_INLINE void scan_rows(const TW* w, const Block& b, const float* bias, int64_t f, int64_t f1, S& out) {
  constexpr int W = NV * kLanes;
  constexpr bool direct = sizeof(TW) == 4;
  const float* rows;
  if constexpr (direct) {
    rows = reinterpret_cast<const float*>(w) + f * b.d;
  } else {
    for (int i = 0; i < MR; ++i) as_float(w + (f + i) * b.d, b.converted + i * b.d, b.d);
    rows = b.converted;
  }
  for (int64_t p = 0; p < b.panels; ++p) {
    const float* ahead = direct && p == 0 && f + 2 * MR <= f1 ? rows + MR * b.d : nullptr;
    tile<MR, NV, true, true>(rows, b.d, b.packed + p * W * b.d, b.d, bias, ahead, nullptr, out, p * W,
                             static_cast<int32_t>(f));
  }
}

/** One depth of the features [f, f1) against one panel of a wide input. */
template <int MR, int NV, bool kFirst, bool kLast, class TW, class S>
inline void scan_depth(const TW* w, const Block& b, const float* bias, int64_t f, int64_t f1, int64_t p, int64_t c0,
                       int64_t depth, S& out) {
  constexpr int W = NV * kLanes;
  const float* panel = b.packed + (p * b.d + c0) * W;
  float* carry = b.carry;
  auto step = [&]<int M>(std::integral_constant<int, M>) __attribute__((always_inline)) {
    const float* rows;
    int64_t ldw = b.d;
    if constexpr (sizeof(TW) == 4) {
      rows = reinterpret_cast<const float*>(w) + f * b.d + c0;
    } else {
      for (int i = 0; i < M; ++i) as_float(w + (f + i) * b.d + c0, b.converted + i * depth, depth);
      rows = b.converted;
      ldw = depth;
    }
    tile<M, NV, kFirst, kLast>(rows, ldw, panel, depth, bias, nullptr, carry, out, p * W, static_cast<int32_t>(f));
    carry += M * W;
    f += M;
  };
  while (f + MR <= f1) step(std::integral_constant<int, MR>{});
  while (f < f1) step(std::integral_constant<int, 1>{});
}

/** All features [f0, f1) against the packed tokens. */
template <int MR, int NV, class TW, class S>
inline void scan(const TW* w, const Block& b, const float* bias, int64_t f0, int64_t f1, S& out) {
  if (b.d <= kDepth) {
    int64_t f = f0;
    for (; f + MR <= f1; f += MR) scan_rows<MR, NV>(w, b, bias, f, f1, out);
    for (; f < f1; ++f) scan_rows<1, NV>(w, b, bias, f, f1, out);
    return;
  }
  for (int64_t f = f0; f < f1; f += kCarried) {
    int64_t end = f + kCarried < f1 ? f + kCarried : f1;
    for (int64_t p = 0; p < b.panels; ++p) {
      scan_depth<MR, NV, true, false>(w, b, bias, f, end, p, 0, kDepth, out);
      int64_t c = kDepth;
      for (; c + kDepth < b.d; c += kDepth) scan_depth<MR, NV, false, false>(w, b, bias, f, end, p, c, kDepth, out);
      scan_depth<MR, NV, false, true>(w, b, bias, f, end, p, c, b.d - c, out);
    }
  }
}

/** `n` tokens, given by number, packed into `memory`. */
template <int MR, int NV, class TW>
inline Block pack_block(const Rows& x, const int64_t* tokens, int64_t n, Scratch& memory) {
  constexpr int W = NV * kLanes;
  int64_t d = x.d, panels = (n + W - 1) / W, padded = panels * W;
  int64_t converted = sizeof(TW) == 4 ? 0 : MR * d, carry = d > kDepth ? kCarried * W : 0;
  float* packed = memory.get<float>(padded * d + converted + carry);
  with_type(x.type, [&]<class TX>(TX) { pack<W>(static_cast<const TX*>(x.data), d, tokens, n, packed); });
  return {packed, panels, d, packed + padded * d, packed + padded * d + converted};
}

/** Memory of one collection, kept for the next task of the same thread. */
struct Room {
  Scratch packed, ints[2], bounds[2];
};

inline void prepare(Lists& lists, int64_t k, int64_t features, int64_t n, int64_t padded, Scratch& ints,
                    Scratch& bounds) {
  lists.keep(k < features ? k : features, features);
  lists.stride = (lists.limit + 16) / 16 * 16 + 16;
  int32_t* memory = ints.get<int32_t>(padded * (2 * lists.stride + 1));
  lists.keys = memory;
  lists.ids = memory + padded * lists.stride;
  lists.counts = memory + 2 * padded * lists.stride;
  lists.bound = bounds.get<float>(padded);
  for (int64_t t = 0; t < padded; ++t) {
    lists.counts[t] = 0;
    lists.bound[t] = t < n ? -INFINITY : INFINITY;  // nothing exceeds it: the padding collects nothing
  }
}

inline void finish(Lists& lists, int64_t n) {
  for (int64_t t = 0; t < n; ++t)
    if (lists.counts[t] > lists.k) lists.cut(t);
}

/**
 * The lists of `n` tokens over all of [f0, f1). With `guess`, some may end with fewer than k, or have lost some of many
 * NaN, which `lost` [n] says: they must be redone.
 */
template <int MR, int NV, class TW>
inline void collect(const Encode& e, const int64_t* tokens, int64_t n, bool guess, Room& room, Selection& out,
                    bool* lost) {
  int64_t f_total = e.f1 - e.f0;
  Block block = pack_block<MR, NV, TW>(e.x, tokens, n, room.packed);
  int64_t padded = block.panels * NV * kLanes;

  prepare(out.main, e.k, f_total, n, padded, room.ints[0], room.bounds[0]);
  out.mask = e.mask;
  if (e.mask) {
    int64_t masked = 0;
    for (int64_t f = e.f0; f < e.f1; ++f) masked += e.mask[f];
    if (masked == 0) out.mask = nullptr;
    prepare(out.aux, e.k_aux, masked > 0 ? masked : 1, n, padded, room.ints[1], room.bounds[1]);
  }

  const TW* w = static_cast<const TW*>(e.w.data);
  int64_t f = e.f0, k = out.main.k;
  if (guess) {
    // The features of a first sixteenth give a bound near rank 2k of the whole at the price of a short list.
    int64_t sample = f_total / 16 / MR * MR;
    int64_t few = 2 * k * sample / f_total + 6;
    out.main.keep(few < k ? few : k, f_total);
    scan<MR, NV>(w, block, e.bias, f, f + sample, out);
    for (int64_t t = 0; t < n; ++t) {
      out.main.cut(t);
      lost[t] = out.main.bound[t] != out.main.bound[t];  // which excludes nothing
    }
    out.main.keep(k, f_total);
    f += sample;
  }
  scan<MR, NV>(w, block, e.bias, f, e.f1, out);
  finish(out.main, n);
  if (out.mask) finish(out.aux, n);
}

/** k codes of one row from at most k candidates in ascending order; missing ones are filled with the first free
 * features. */
template <class T>
inline void write_codes(const int32_t* keys, const int32_t* ids, int64_t m, int64_t k, T* values, uint32_t* indices) {
  auto value = [](int32_t key) { return key == kNanKey ? NAN : from_key(key) <= 0 ? 0.0f : from_key(key); };
  if (m == k) {
    for (int64_t i = 0; i < k; ++i) {
      values[i] = from_float<T>(value(keys[i]));
      indices[i] = static_cast<uint32_t>(ids[i]);
    }
    return;
  }
  // Fewer than k exceed -inf: the rest are ties at -inf, of which the lowest features are taken.
  int64_t missing = k - m, next = 0, i = 0;
  for (int64_t o = 0; o < k; ++o) {
    bool fill = missing > 0 && (i >= m || next < ids[i]);
    if (fill) {
      values[o] = from_float<T>(0.0f);
      indices[o] = static_cast<uint32_t>(next++);
      --missing;
    } else {
      if (next == ids[i]) ++next;
      values[o] = from_float<T>(value(keys[i]));
      indices[o] = static_cast<uint32_t>(ids[i++]);
    }
  }
}

/** Codes, or where the features are only a part of all the candidates to be merged. */
inline void write(const Lists& lists, int64_t i, int64_t token, const Codes& to) {
  const int32_t *keys = lists.keys + i * lists.stride, *ids = lists.ids + i * lists.stride;
  int64_t m = lists.counts[i];
  if (to.keys) {
    std::memcpy(to.keys + token * to.room, keys, m * sizeof(int32_t));
    std::memcpy(to.ids + token * to.room, ids, m * sizeof(int32_t));
    to.counts[token] = static_cast<int32_t>(m);
  } else {
    with_type(to.type, [&]<class T>(T) {
      write_codes(keys, ids, m, to.k, static_cast<T*>(to.values) + token * to.k, to.indices + token * to.k);
    });
  }
}

template <int MR, int NV, class TW>
inline void encode_block(const Encode& e) {
  static thread_local Room room;
  static thread_local Scratch token_mem, lost_mem;
  int64_t n = e.t1 - e.t0, f_total = e.f1 - e.f0;
  int64_t* tokens = token_mem.get<int64_t>(2 * n);
  int64_t* again = tokens + n;
  for (int64_t t = 0; t < n; ++t) tokens[t] = e.t0 + t;

  Selection found;
  auto write_all = [&](int64_t i, int64_t token) {
    write(found.main, i, token, e.out);
    if (!e.mask) return;
    if (!found.mask) found.aux.counts[i] = 0;
    write(found.aux, i, token, e.aux);
  };
  bool guess = f_total >= 4096 && e.k * 32 <= f_total;
  bool* lost = lost_mem.get<bool>(n);
  collect<MR, NV, TW>(e, tokens, n, guess, room, found, lost);
  int64_t redo = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (guess && (lost[i] || found.main.counts[i] < found.main.k))  // the sample was not like the rest
      again[redo++] = tokens[i];
    else
      write_all(i, tokens[i]);
  }
  if (redo) {
    collect<MR, NV, TW>(e, again, redo, false, room, found, nullptr);
    for (int64_t i = 0; i < redo; ++i) write_all(i, again[i]);
  }
}

// The tile fills the registers.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kTileFeatures = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileFeatures = 4, kTileVectors = 3;
#else
constexpr int kTileFeatures = 3, kTileVectors = 4;
#endif

inline void encode(const Encode& e) {
  with_type(e.w.type, [&]<class TW>(TW) {
    if (e.t1 - e.t0 <= kLanes)  // a handful of tokens
      encode_block<12, 1, TW>(e);
    else
      encode_block<kTileFeatures, kTileVectors, TW>(e);
  });
}

template <int MR, int NV, class TW>
inline void above_block(const Above& e) {
  static thread_local Scratch packed, token_mem;
  int64_t n = e.t1 - e.t0;
  int64_t* tokens = token_mem.get<int64_t>(n);
  for (int64_t t = 0; t < n; ++t) tokens[t] = e.t0 + t;
  Block block = pack_block<MR, NV, TW>(e.x, tokens, n, packed);
  Hits out{e, n};
  scan<MR, NV>(static_cast<const TW*>(e.w.data), block, e.bias, e.f0, e.f1, out);
}

inline void above(const Above& e) {
  with_type(e.w.type, [&]<class TW>(TW) {
    if (e.t1 - e.t0 <= kLanes)
      above_block<12, 1, TW>(e);
    else
      above_block<kTileFeatures, kTileVectors, TW>(e);
  });
}

inline void merge(const Merge& m) {
  static thread_local Scratch mem;
  const Codes& c = m.out;
  int64_t stride = (m.parts * c.room + 15) / 16 * 16 + 16;
  int32_t* keys = mem.get<int32_t>(2 * stride);
  int32_t* ids = keys + stride;
  for (int64_t t = m.t0; t < m.t1; ++t) {
    int64_t count = 0;
    for (int64_t p = 0; p < m.parts; ++p) {
      int64_t row = p * m.n + t;
      std::memcpy(keys + count, c.keys + row * c.room, c.counts[row] * sizeof(int32_t));
      std::memcpy(ids + count, c.ids + row * c.room, c.counts[row] * sizeof(int32_t));
      count += c.counts[row];
    }
    if (count > c.k) {
      keep_largest(keys, ids, count, c.k);
      count = c.k;
    }
    with_type(c.type, [&]<class T>(T) {
      write_codes(keys, ids, count, c.k, static_cast<T*>(c.values) + t * c.k, c.indices + t * c.k);
    });
  }
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
