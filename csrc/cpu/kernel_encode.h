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
  [[noreturn]] static void throw_bad_alloc();

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

template <class F>
MLXSAE_INLINE void with_type(Type type, F&& f) {
  switch (type) {
    case Type::f32: return f(float{});
    case Type::f16: return f(f16{});
    case Type::bf16: return f(bf16{});
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
  vi c{}, b = splat(bound);
  for (int64_t i = 0; i < m; i += kLanes) c -= load(keys + i) >= b;
  return sum(c);
}

/**
 * The k-th largest of m keys (1 <= k <= m), by bisection. `keys` must be readable and writable up to a multiple of
 * the lanes.
 */
inline int32_t kth_largest(int32_t* keys, int64_t m, int64_t k) {
  int64_t padded = (m + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = m; i < padded; ++i) keys[i] = INT32_MIN;
  vi lo_v = load(keys), hi_v = lo_v;
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    vi q = load(keys + i);
    hi_v = q > hi_v ? q : hi_v;
  }
  int64_t hi = INT32_MIN, lo = INT32_MIN;
  for (int i = 0; i < kLanes; ++i) hi = hi_v[i] > hi ? hi_v[i] : hi;
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
  int64_t capacity;  // entries a token
  int32_t* keys;     // [tokens, capacity + pad]
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
  MLXSAE_INLINE void add(int64_t t, float v, int32_t feature) {
    int64_t c = counts[t]++;
    keys[t * stride + c] = to_key(v);
    ids[t * stride + c] = feature;
    if (c + 1 >= limit) cut(t);
  }
};

template <int NV>
__attribute__((noinline)) void emit(Lists& lists, int64_t t0, int32_t feature, const vf* a) {
  for (int v = 0; v < NV; ++v) {
    uint32_t mask = not_le(a[v], load(lists.bound + t0 + v * kLanes));
    while (mask) {
      int lane = __builtin_ctz(mask);
      mask &= mask - 1;
      lists.add(t0 + v * kLanes + lane, a[v][lane], feature);
    }
  }
}

/** MR features x (NV * lanes) tokens: product, bias, filter. `ahead`: rows that will be needed next, or null. */
template <int MR, int NV>
MLXSAE_INLINE void tile(const float* w, int64_t ldw, const float* panel, int64_t d, const float* bias, const float* ahead,
                        Lists& lists, int64_t t0, int32_t feature) {
  vf acc[MR][NV];
  MLXSAE_UNROLL for (int i = 0; i < MR; ++i) {
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = vf{};
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
  for (; c + 16 <= d; c += 16) {  // one cache line of each row
    if (ahead) {
      MLXSAE_UNROLL for (int i = 0; i < MR; ++i) prefetch(ahead + i * ldw + c);
    }
    _Pragma("GCC unroll 4") for (int q = 0; q < 16; ++q) multiply_add(c + q);
  }
  for (; c < d; ++c) multiply_add(c);

  MLXSAE_UNROLL for (int i = 0; i < MR; ++i) {
    bool any = false;
    if (bias) {
      vf b = splat(bias[feature + i]);
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] += b;
    }
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) any |= any_not_le(acc[i][v], load(lists.bound + t0 + v * kLanes));
    if (__builtin_expect(any, 0)) emit<NV>(lists, t0, feature + i, acc[i]);
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

/** All features [f0, f1) against the packed tokens. */
template <int MR, int NV, class TW>
inline void scan(const TW* w, int64_t d, const float* bias, int64_t f0, int64_t f1, const float* packed, int64_t panels,
                 float* converted, Lists& lists) {
  constexpr int W = NV * kLanes;
  constexpr bool direct = sizeof(TW) == 4;
  int64_t f = f0;
  for (; f + MR <= f1; f += MR) {
    const float* rows;
    if constexpr (direct) {
      rows = reinterpret_cast<const float*>(w) + f * d;
    } else {
      for (int i = 0; i < MR; ++i) as_float(w + (f + i) * d, converted + i * d, d);
      rows = converted;
    }
    for (int64_t p = 0; p < panels; ++p) {
      const float* ahead = direct && p == 0 && f + 2 * MR <= f1 ? rows + MR * d : nullptr;
      tile<MR, NV>(rows, d, packed + p * W * d, d, bias, ahead, lists, p * W, static_cast<int32_t>(f));
    }
  }
  for (; f < f1; ++f) {
    const float* row = as_float(w + f * d, converted, d);
    for (int64_t p = 0; p < panels; ++p)
      tile<1, NV>(row, d, packed + p * W * d, d, bias, nullptr, lists, p * W, static_cast<int32_t>(f));
  }
}

/** The lists of `n` tokens over all of [f0, f1). With `guess`, some may end with fewer than k: they must be redone. */
template <int MR, int NV, class TW>
inline void collect(const Encode& e, const int64_t* tokens, int64_t n, bool guess, Scratch (&mem)[3], Lists& lists) {
  constexpr int W = NV * kLanes;
  int64_t d = e.x.d, panels = (n + W - 1) / W, padded = panels * W, f_total = e.f1 - e.f0;
  float* packed = mem[0].get<float>(padded * d + (sizeof(TW) == 4 ? 0 : MR * d));
  float* converted = packed + padded * d;
  with_type(e.x.type, [&]<class TX>(TX) { pack<W>(static_cast<const TX*>(e.x.data), d, tokens, n, packed); });

  int64_t k = e.k < f_total ? e.k : f_total;
  lists.keep(k, f_total);
  lists.capacity = lists.limit;
  lists.stride = (lists.capacity + 16) / 16 * 16 + 16;
  int32_t* ints = mem[1].get<int32_t>(padded * (2 * lists.stride + 1));
  lists.keys = ints;
  lists.ids = ints + padded * lists.stride;
  lists.counts = ints + 2 * padded * lists.stride;
  lists.bound = mem[2].get<float>(padded);
  for (int64_t t = 0; t < padded; ++t) {
    lists.counts[t] = 0;
    lists.bound[t] = t < n ? -INFINITY : INFINITY;  // nothing exceeds it: the padding collects nothing
  }

  const TW* w = static_cast<const TW*>(e.w.data);
  int64_t f = e.f0;
  if (guess) {
    // The features of a first sixteenth give a bound near rank 2k of the whole at the price of a short list.
    int64_t sample = f_total / 16 / MR * MR;
    int64_t few = 2 * k * sample / f_total + 6;
    lists.keep(few < k ? few : k, f_total);
    scan<MR, NV>(w, d, e.bias, f, f + sample, packed, panels, converted, lists);
    for (int64_t t = 0; t < n; ++t) lists.cut(t);
    lists.keep(k, f_total);
    f += sample;
  }
  scan<MR, NV>(w, d, e.bias, f, e.f1, packed, panels, converted, lists);
  for (int64_t t = 0; t < n; ++t)
    if (lists.counts[t] > k) lists.cut(t);
}

/** k codes of one row from at most k candidates in ascending order; missing ones are filled with the first free features. */
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

template <int MR, int NV, class TW>
inline void encode_block(const Encode& e) {
  static thread_local Scratch mem[2][3];
  static thread_local Scratch token_mem;
  int64_t n = e.t1 - e.t0, f_total = e.f1 - e.f0, k = e.k < f_total ? e.k : f_total;
  int64_t* tokens = token_mem.get<int64_t>(2 * n);
  int64_t* again = tokens + n;
  for (int64_t t = 0; t < n; ++t) tokens[t] = e.t0 + t;

  auto write = [&](const Lists& lists, int64_t i, int64_t token) {
    const int32_t *keys = lists.keys + i * lists.stride, *ids = lists.ids + i * lists.stride;
    if (e.keys) {  // candidates of a part, to be merged
      int64_t m = lists.counts[i];
      std::memcpy(e.keys + token * e.k, keys, m * sizeof(int32_t));
      std::memcpy(e.ids + token * e.k, ids, m * sizeof(int32_t));
      e.counts[token] = static_cast<int32_t>(m);
    } else {
      with_type(e.values_type, [&]<class T>(T) {
        write_codes(keys, ids, lists.counts[i], e.k, static_cast<T*>(e.values) + token * e.k, e.indices + token * e.k);
      });
    }
  };

  Lists lists;
  bool guess = f_total >= 4096 && k * 32 <= f_total;
  collect<MR, NV, TW>(e, tokens, n, guess, mem[0], lists);
  int64_t redo = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (guess && lists.counts[i] < k)  // the sample was not like the rest
      again[redo++] = tokens[i];
    else
      write(lists, i, tokens[i]);
  }
  if (redo) {
    collect<MR, NV, TW>(e, again, redo, false, mem[1], lists);
    for (int64_t i = 0; i < redo; ++i) write(lists, i, again[i]);
  }
}

// The tile fills the registers. A panel of tokens must stay in the second-level cache with room for the weights, so
// wide inputs take narrower panels, and a handful of tokens the narrowest.
#if defined(__AVX512F__)
constexpr int kTileFeatures = 6, kTileVectors = 4, kNarrowFeatures = 12, kNarrowVectors = 2;
#elif defined(__AVX2__)
constexpr int kTileFeatures = 6, kTileVectors = 2, kNarrowFeatures = 6, kNarrowVectors = 2;
#elif defined(__ARM_NEON)
constexpr int kTileFeatures = 6, kTileVectors = 4, kNarrowFeatures = 12, kNarrowVectors = 2;
#else
constexpr int kTileFeatures = 3, kTileVectors = 4, kNarrowFeatures = 3, kNarrowVectors = 4;
#endif
constexpr int64_t kPanelBytes = 600 << 10;

inline void encode(const Encode& e) {
  with_type(e.w.type, [&]<class TW>(TW) {
    if (e.t1 - e.t0 <= kLanes)
      encode_block<12, 1, TW>(e);
    else if (kTileVectors * kLanes * e.x.d * 4 <= kPanelBytes)
      encode_block<kTileFeatures, kTileVectors, TW>(e);
    else
      encode_block<kNarrowFeatures, kNarrowVectors, TW>(e);
  });
}

inline void merge(const Merge& m) {
  static thread_local Scratch mem;
  int64_t stride = (m.parts * m.k + 15) / 16 * 16 + 16;
  int32_t* keys = mem.get<int32_t>(2 * stride);
  int32_t* ids = keys + stride;
  for (int64_t t = m.t0; t < m.t1; ++t) {
    int64_t c = 0;
    for (int64_t p = 0; p < m.parts; ++p) {
      int64_t row = p * m.n + t;
      std::memcpy(keys + c, m.keys + row * m.k, m.counts[row] * sizeof(int32_t));
      std::memcpy(ids + c, m.ids + row * m.k, m.counts[row] * sizeof(int32_t));
      c += m.counts[row];
    }
    if (c > m.k) {
      keep_largest(keys, ids, c, m.k);
      c = m.k;
    }
    with_type(m.values_type, [&]<class T>(T) {
      write_codes(keys, ids, c, m.k, static_cast<T*>(m.values) + t * m.k, m.indices + t * m.k);
    });
  }
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
