#pragma once
// Certified low precision: the product in 16 bits, and an interval around each result that the float32 result of the
// encode kernel cannot leave. With u = 2^-24, bars for the numbers in 16 bits, and gamma = 2 (d + 16) u (twice the
// worst rounding of d + 16 additions, so that truncating hardware is covered as well):
//
//   |s - s_bar| <= |x - x_bar| |w| + |x_bar| |w - w_bar|              Cauchy-Schwarz on the two roundings
//                + gamma |x| |w| + chain |x_bar| |w_bar|              rounding of both chains
//                + 4 u |b| + tiny                                     rounding of the bias; subnormals flushed to zero
//                =  row[0] col[0] + row[1] col[1] + col[2]
//
// Numbers in 16 bits are bfloat16, where the processor multiplies these, or integers v_bar = q |v| 2^-15: what the
// screen of every other x86 runs on. A product of integers is exact, as by Cauchy-Schwarz no sum, whole or partial,
// exceeds (2^15 + sqrt(d) / 2)^2 < 2^31; then `chain` covers the conversion and the scales alone, 16 u, where for
// bfloat16 it is gamma. An integer is off by |v| 2^-16 at most, so |v - v_bar| is about sqrt(d / 12) 2^-15 |v|: for
// d < 16384 the closer of the two.
//
// Every norm is rounded up. A feature can be among the k largest only if its upper end reaches the k-th largest lower
// end; those features are computed again, in the very order of the encode kernel, so the codes are its bits.

#include "cpu/kernel_update.h"

namespace mlxsae::cpu::MLXSAE_ISA {

typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

/** Room for d flushed products and inputs of 2^-126. */
MLXSAE_INLINE float tiny(int64_t d, float a, float b) { return 4e-38f * static_cast<float>(d) * (1 + a + b); }

/** Twice what d + 16 roundings of a sum may come to, relative to its terms. */
MLXSAE_INLINE float gamma_of(int64_t d) { return 2 * static_cast<float>(d + 16) * 5.97e-8f; }

/** A row in 16 bits, by its norms: |v|, |v - v_bar|, |v_bar|, each rounded up. */
struct Rounded {
  float full, rest, low;
};

/** Norms from sums of d squares. */
struct Norm {
  float up, lost;  // a factor on the safe side; squares below the smallest normal number

  explicit Norm(int64_t d) : up(1 + 1e-5f + static_cast<float>(d) * 6e-8f), lost(1.2e-38f * static_cast<float>(d)) {}
  float operator()(float square) const { return __builtin_sqrtf(square + lost) * up; }
};

struct Bfloats {
  static constexpr ShadowType type = ShadowType::bf16;

  static float chain(int64_t d) { return gamma_of(d); }

  static Rounded round(const float* v, uint16_t* out, int64_t d) {
    Sum full, rest, low;
    lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) {
      V x = get<V>(v + c), y;
      if constexpr (sizeof(V) == 4) {
        bf16 h = from_float<bf16>(x);
        out[c] = h.bits;
        y = to_float(h);
      } else {
        vi bits = (vi)x;
        vi nan = x != x;
        vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
        vi kept = (nan & (bits | 0x400000)) | (~nan & rounded);
        kept &= splat(int32_t(0xffff0000));
        vh low = __builtin_convertvector((kept >> 16) & 0xffff, vh);
        std::memcpy(static_cast<void*>(out + c), &low, sizeof(low));
        y = (V)kept;
      }
      full.add(x * x), rest.add((x - y) * (x - y)), low.add(y * y);
    });
    Norm norm(d);
    return {norm(full.total()), norm(rest.total()), norm(low.total())};
  }

#if defined(__AVX512BF16__)
  static constexpr int kFeatures = 6, kVectors = 4;  // a tile
  using Accumulator = vf;

  static MLXSAE_INLINE vf multiply_add(vf sum, int32_t two, vi x) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(two), (__m512bh)x);
  }
  static MLXSAE_INLINE vf value(vf sum, vf, float) { return sum; }
#endif
};

struct Integers {
  static constexpr ShadowType type = ShadowType::i16;
  static constexpr float kUnit = 0x1p-15f;  // v_bar = q |v| kUnit

  static float chain(int64_t) { return 16 * 5.97e-8f; }

  static Rounded round(const float* v, uint16_t* out, int64_t d) {
    Sum square;
    lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) { square.add(get<V>(v + c) * get<V>(v + c)); });
    Norm norm(d);
    // Both factors are exact, but for `inverse`, which only decides what is rounded to what.
    float full = norm(square.total()), scale = full * kUnit, inverse = 1 / scale;
    Sum rest, low;
    lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) {
      // To the nearest by adding what leaves no room for a fraction; norms are infinite or NaN where it fails.
      constexpr float kRound = 0x1.8p23f, kMost = 32767;
      V x = get<V>(v + c), q = (x * inverse + kRound) - kRound;
      q = q > kMost ? V{} + kMost : q;
      q = q < -kMost ? V{} - kMost : q;
      if constexpr (sizeof(V) == 4) {
        out[c] = q == q ? static_cast<uint16_t>(static_cast<int16_t>(q)) : 0;
      } else {
        vh low = __builtin_convertvector(__builtin_convertvector(q, vi), vh);
        std::memcpy(static_cast<void*>(out + c), &low, sizeof(low));
      }
      V y = q * scale;
      rest.add((x - y) * (x - y)), low.add(y * y);
    });
    return {full, norm(rest.total()), norm(low.total())};
  }

#if defined(__AVX2__)
#if defined(__AVX512BW__)
  static constexpr int kFeatures = 6, kVectors = 4;
#else
  static constexpr int kFeatures = 6, kVectors = 2;
#endif
  using Accumulator = vi;

  static MLXSAE_INLINE vi multiply_add(vi sum, int32_t two, vi x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)splat(two), (__m512i)x);
#elif defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)splat(two), (__m512i)x);
#else
    return sum + (vi)_mm256_madd_epi16((__m256i)splat(two), (__m256i)x);
#endif
  }
  /** The scales one after the other: their product may be subnormal where this is not. */
  static MLXSAE_INLINE vf value(vi sum, vf of_row, float of_column) {
    return __builtin_convertvector(sum, vf) * (of_row * kUnit) * (of_column * kUnit);
  }
#endif
};

/** The shadow of the rows [f0, f1) of an encoder, and the columns [3, d_sae] of the bound. */
template <class Q>
inline void shadow_of(const float* w, int64_t d_sae, int64_t d, uint16_t* out, float* columns, int64_t f0, int64_t f1) {
  for (int64_t j = f0; j < f1; ++j) {
    Rounded r = Q::round(w + j * d, out + j * d, d);
    columns[j] = r.full;
    columns[d_sae + j] = (r.rest + Q::chain(d) * r.low) * 1.0001f;
    columns[2 * d_sae + j] = tiny(d, r.full, 0);
  }
}

inline void shadow(const float* w, int64_t d_sae, int64_t d, ShadowType type, uint16_t* out, float* columns, int64_t f0,
                   int64_t f1) {
  (type == ShadowType::bf16 ? shadow_of<Bfloats> : shadow_of<Integers>)(w, d_sae, d, out, columns, f0, f1);
}

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

/** Four coordinates of four rows, turned so that a row lies in each lane. */
MLXSAE_INLINE void turn(const float* const* rows, int64_t c, v4* out) {
  v4 r[4];
  MLXSAE_UNROLL for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const v4*>(rows[i] + c);
  v4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  v4 e = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), f = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  out[0] = __builtin_shufflevector(a, e, 0, 1, 4, 5);
  out[1] = __builtin_shufflevector(a, e, 2, 3, 6, 7);
  out[2] = __builtin_shufflevector(b, f, 0, 1, 4, 5);
  out[3] = __builtin_shufflevector(b, f, 2, 3, 6, 7);
}

/**
 * Eight dot products at once, each one chain over ascending coordinates: the bits of the encode kernel. `next`: sixteen
 * rows to fetch meanwhile.
 */
inline void chains(const float* const* a, const float* const* b, int64_t d, float* out, const float* const* next) {
  v4 s[2] = {};
  int64_t c = 0;
  for (; c + 4 <= d; c += 4) {
    if (c % 16 == 0)
      for (int i = 0; i < 16; ++i) prefetch<2>(next[i] + c);
    MLXSAE_UNROLL for (int g = 0; g < 2; ++g) {
      v4 x[4], y[4];
      turn(a + 4 * g, c, x);
      turn(b + 4 * g, c, y);
      MLXSAE_UNROLL for (int q = 0; q < 4; ++q) s[g] += x[q] * y[q];
    }
  }
  for (int i = 0; i < 8; ++i) {
    out[i] = s[i / 4][i % 4];
    for (int64_t q = c; q < d; ++q) out[i] = __builtin_fmaf(a[i][q], b[i][q], out[i]);
  }
}

/** out[e] = <x[rows[e]], w[ids[e]]> + bias[ids[e]] in the order of the encode kernel, for entries sorted by feature. */
inline void rescore(const Rescore& r, int64_t begin, int64_t end) {
  constexpr int N = 8;
  for (int64_t e = begin; e < end; e += N) {
    const float *a[N], *b[N], *next[2 * N];
    float out[N];
    int64_t m = end - e < N ? end - e : N;
    for (int i = 0; i < N; ++i) {
      int64_t q = e + (i < m ? i : 0), ahead = e + N + i < end ? e + N + i : q;
      a[i] = r.x + int64_t(r.rows[q]) * r.d, next[i] = r.x + int64_t(r.rows[ahead]) * r.d;
      b[i] = r.w + int64_t(r.ids[q]) * r.d, next[N + i] = r.w + int64_t(r.ids[ahead]) * r.d;
    }
    chains(a, b, r.d, out, next);
    for (int64_t i = 0; i < m; ++i) r.out[e + i] = out[i] + (r.bias ? r.bias[r.ids[e + i]] : 0.0f);
  }
}

/** Fast dot products of the same entries, in any order of additions. */
inline void estimate(const Rescore& r, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) {
    if (e + 1 < end) {
      const float* ahead = r.x + int64_t(r.rows[e + 1]) * r.d;
      for (int64_t c = 0; c < r.d; c += 16) prefetch<2>(ahead + c);
      const float* w = r.w + int64_t(r.ids[e + 1]) * r.d;
      for (int64_t c = 0; c < r.d && r.ids[e + 1] != r.ids[e]; c += 16) prefetch<2>(w + c);
    }
    float s = dot(r.x + int64_t(r.rows[e]) * r.d, r.w + int64_t(r.ids[e]) * r.d, r.d);
    r.out[e] = s + (r.bias ? r.bias[r.ids[e]] : 0.0f);
  }
}

#if defined(__AVX2__)

/** Candidates with intervals. `keys` are the lower ends, `upper` the upper ones. */
struct Intervals {
  int32_t* keys;
  float* upper;
  int32_t* ids;
  int32_t* counts;
  int32_t* limits;
  float* bound;  // the filter: an upper end below it is out
  int64_t stride, k, capacity;

  __attribute__((noinline)) void cut(int64_t t) {
    int64_t m = counts[t];
    if (k == 0) return overflow(t);  // the bound is given, and there is no more room
    if (m < k) return;
    int32_t *key = keys + t * stride, *id = ids + t * stride;
    float* up = upper + t * stride;
    float b = from_key(kth_largest(key, m, k));
    if (b > bound[t]) bound[t] = b;
    int64_t o = 0;
    for (int64_t i = 0; i < m; ++i) {
      int32_t q = key[i], f = id[i];
      float u = up[i];
      key[o] = q, id[o] = f, up[o] = u;
      o += u >= bound[t];
    }
    counts[t] = static_cast<int32_t>(o);
    int64_t next = o + 2 * k + 16;
    limits[t] = static_cast<int32_t>(next < capacity ? next : capacity);
    if (o >= capacity) overflow(t);  // too many intervals overlap
  }
  /** The token goes to the float32 kernel. */
  MLXSAE_INLINE void overflow(int64_t t) {
    bound[t] = INFINITY;
    counts[t] = -1;
  }
  MLXSAE_INLINE void add(int64_t t, float lower, float up, int32_t feature) {
    if (counts[t] < 0) return;
    int64_t c = counts[t]++;
    keys[t * stride + c] = to_key(lower);
    upper[t * stride + c] = up;
    ids[t * stride + c] = feature;
    if (c + 1 >= limits[t]) cut(t);
  }
};

/** What a tile of the screen reads beside its weights. */
struct ScreenBlock {
  const Screen& s;
  const uint32_t* packed;  // [panels][pairs][width] pairs of coordinates
  int64_t pairs;
  const float *full, *row0, *row1;  // [tokens]
  Intervals& lists;
};

template <int NV>
__attribute__((noinline)) void emit_intervals(Intervals& lists, const vf* lower, const vf* up, int64_t t0,
                                              int32_t feature) {
  for (int v = 0; v < NV; ++v) {
    uint32_t mask = at_least(up[v], load(lists.bound + t0 + v * kLanes));
    while (mask) {
      int lane = __builtin_ctz(mask);
      mask &= mask - 1;
      lists.add(t0 + v * kLanes + lane, lower[v][lane], up[v][lane], feature);
    }
  }
}

/** M features against the tokens of panel p: product, interval, filter. */
template <class Q, int M>
__attribute__((noinline)) void screen_tile(const ScreenBlock& b, int64_t f, int64_t p, bool ahead) {
  constexpr int NV = Q::kVectors, W = NV * kLanes;
  const Screen& s = b.s;
  const int64_t d = s.d;
  const uint16_t* w = s.w16 + f * d;
  const uint32_t* panel = b.packed + p * W * b.pairs;
  typename Q::Accumulator acc[M][NV] = {};
  auto multiply_add = [&](int64_t c, int bytes) __attribute__((always_inline)) {
    vi x[NV];
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) x[v] =
        load(reinterpret_cast<const int32_t*>(panel) + c * W + v * kLanes);
    MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
      int32_t two = 0;
      std::memcpy(&two, w + i * d + 2 * c, bytes);
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = Q::multiply_add(acc[i][v], two, x[v]);
    }
  };
  int64_t c = 0, whole = d / 2;
  for (; c + 16 <= whole; c += 16) {
    if (ahead) {
      MLXSAE_UNROLL for (int i = 0; i < M; ++i) prefetch(w + (M + i) * d + 2 * c);
    }
    _Pragma("GCC unroll 4") for (int q = 0; q < 16; ++q) multiply_add(c + q, 4);
  }
  for (; c < whole; ++c) multiply_add(c, 4);
  if (d % 2) multiply_add(c, 2);

  MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
    int64_t j = f + i;
    float bias = s.bias ? s.bias[j] : 0.0f, full = s.columns[j];
    vf bias_v = splat(bias), c0 = splat(full), c1 = splat(s.columns[s.d_sae + j]);
    vf c2 = splat(s.columns[2 * s.d_sae + j] + 2.4e-7f * __builtin_fabsf(bias));
    uint32_t any = 0;
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) {
      int64_t t = p * W + v * kLanes;
      vf e = load(b.row0 + t) * c0 + load(b.row1 + t) * c1 + c2;
      any |= at_least(Q::value(acc[i][v], load(b.full + t), full) + bias_v + e, load(b.lists.bound + t));
    }
    if (__builtin_expect(any != 0, 0)) {
      vf lower[NV], up[NV];
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) {
        int64_t t = p * W + v * kLanes;
        vf e = load(b.row0 + t) * c0 + load(b.row1 + t) * c1 + c2;
        vf a = Q::value(acc[i][v], load(b.full + t), full) + bias_v;
        lower[v] = a - e, up[v] = a + e;
      }
      emit_intervals<NV>(b.lists, lower, up, p * W, static_cast<int32_t>(j));
    }
  }
}

/** The screen of one task's tokens over all features (Screen in kernels.h). */
template <class Q>
inline void screen(const Screen& s) {
  constexpr int MR = Q::kFeatures, W = Q::kVectors * kLanes;
  static thread_local Scratch mem[6];
  const int64_t n = s.t1 - s.t0, d = s.d, pairs = (d + 1) / 2, panels = (n + W - 1) / W, padded = panels * W;
  uint32_t* packed = mem[0].get<uint32_t>(padded * pairs);
  float* row = mem[1].get<float>(4 * padded);
  float *full = row, *row0 = row + padded, *row1 = row + 2 * padded, *bound = row + 3 * padded;
  uint16_t* rounded = mem[2].get<uint16_t>(d + 2);
  Intervals lists;
  lists.k = s.k;
  lists.capacity = s.capacity;
  lists.stride = (s.capacity + 16) / 16 * 16 + 16;
  lists.keys = mem[3].get<int32_t>(padded * (2 * lists.stride + 2));
  lists.ids = lists.keys + padded * lists.stride;
  lists.counts = lists.ids + padded * lists.stride;
  lists.limits = lists.counts + padded;
  lists.upper = mem[4].get<float>(padded * lists.stride);
  lists.bound = bound;

  for (int64_t t = 0; t < padded; ++t) {
    uint32_t* to = packed + (t / W) * W * pairs + t % W;
    lists.counts[t] = 0;
    bool there = t < n;
    bound[t] = !there ? INFINITY : s.k ? -INFINITY : s.floor;
    full[t] = row0[t] = row1[t] = 0;
    if (!there) {
      for (int64_t c = 0; c < pairs; ++c) to[c * W] = 0;
      continue;
    }
    rounded[d] = 0;
    Rounded r = Q::round(s.x + (s.t0 + t) * d, rounded, d);
    for (int64_t c = 0; c < pairs; ++c) std::memcpy(&to[c * W], rounded + 2 * c, 4);
    row0[t] = (r.rest + gamma_of(d) * r.full) * 1.0001f;
    row1[t] = r.low, full[t] = r.full;
    s.norms[s.t0 + t] = r.full;
    if (!(r.full < 1e18f)) lists.counts[t] = -1, bound[t] = INFINITY;  // NaN, infinite, or squares that may overflow
  }

  ScreenBlock block{s, packed, pairs, full, row0, row1, lists};
  auto scan16 = [&](int64_t f0, int64_t f1) {
    int64_t f = f0;
    for (; f + MR <= f1; f += MR)
      for (int64_t p = 0; p < panels; ++p) screen_tile<Q, MR>(block, f, p, p == 0 && f + 2 * MR <= s.d_sae);
    for (; f < f1; ++f)
      for (int64_t p = 0; p < panels; ++p) screen_tile<Q, 1>(block, f, p, false);
  };
  auto start = [&](int64_t k) {
    lists.k = k;
    for (int64_t t = 0; t < padded; ++t) {
      int64_t next = (lists.counts[t] > 0 ? lists.counts[t] : 0) + 2 * k + 16;
      lists.limits[t] = static_cast<int32_t>(k > 0 && next < lists.capacity ? next : lists.capacity);
    }
  };
  int64_t f = 0;
  if (s.k > 0 && s.d_sae >= 4096 &&
      s.k * 32 <= s.d_sae) {  // a first bound from a sixteenth of the features, as in encode
    int64_t sample = s.d_sae / 16 / MR * MR, few = 2 * s.k * sample / s.d_sae + 6;
    start(few < s.k ? few : s.k);
    scan16(0, sample);
    for (int64_t t = 0; t < n; ++t)
      if (lists.counts[t] > 0) lists.cut(t);
    f = sample;
  }
  start(s.k);
  scan16(f, s.d_sae);

  for (int64_t t = 0; t < n; ++t) {
    int32_t* to_ids = s.ids + (s.t0 + t) * s.capacity;
    int64_t m = lists.counts[t];
    if (s.k > 0) {
      // Certified: at least k lower ends reach the bound, so it is a true one.
      int64_t reach = 0;
      for (int64_t i = 0; i < m; ++i) reach += from_key(lists.keys[t * lists.stride + i]) >= bound[t];
      if (reach >= s.k) {
        lists.cut(t);
        m = lists.counts[t];
      } else {
        m = -1;
      }
    }
    s.counts[s.t0 + t] = static_cast<int32_t>(m);
    if (m > 0) std::memcpy(to_ids, lists.ids + t * lists.stride, m * sizeof(int32_t));
    for (int64_t i = 0; i < m && s.k > 0; ++i) {
      int64_t at = t * lists.stride + i;
      s.upper[(s.t0 + t) * s.capacity + i] = from_key(lists.keys[at]) >= bound[t] ? INFINITY : lists.upper[at];
    }
  }
}

#endif

}  // namespace mlxsae::cpu::MLXSAE_ISA
