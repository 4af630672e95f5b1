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
// Where VNNI multiplies bytes at twice the rate of integers of 16 bits, the integer of a weight lies in two bytes, q =
// unit high + low, a unit for each row, so that the high bytes alone are the weight to 8 bits; the token has bytes of
// its own, in units of its largest coordinate. Every product is made of bytes, and bounded in the same way; only a pair
// whose interval reaches what its token has by then, about one in fifty, is multiplied in 16 bits. Tokens
// with few large coordinates are told too little by bytes: while more than a quarter of the pairs pass, integers take
// over.
//
// Every norm is rounded up. A feature can be among the k largest only if its upper end reaches the k-th largest lower
// end; those features are computed again, in the very order of the encode kernel, so the codes are its bits.

#include <type_traits>
#include <utility>

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

/** The largest absolute value; NaN does not count. */
struct Most {
  vf wide{};
  float rest = 0;
  MLXSAE_INLINE void add(vf v) {
#if defined(__AVX512F__)
    wide = (vf)_mm512_max_ps(_mm512_abs_ps((__m512)v), (__m512)wide);  // the second where either one is NaN
#else
    v = v < 0 ? -v : v;
    wide = v > wide ? v : wide;
#endif
  }
  MLXSAE_INLINE void add(float v) {
    v = __builtin_fabsf(v);
    rest = v > rest ? v : rest;
  }
  float total() const {
    vf most = wide;
    for (int w = kLanes / 2; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) most[i] = most[i + w] > most[i] ? most[i + w] : most[i];
    return most[0] > rest ? most[0] : rest;
  }
};

/** As lanes, with four sums side by side: body(c, which of them). */
template <class Body>
MLXSAE_INLINE void by_four(int64_t d, Body&& body) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= d; c += 4 * kLanes)
    MLXSAE_UNROLL for (int i = 0; i < 4; ++i) body.template operator()<vf>(c + i * kLanes, i);
  lanes(d - c, [&]<class V>(int64_t at) __attribute__((always_inline)) { body.template operator()<V>(c + at, 0); });
}
MLXSAE_INLINE float total(const Sum* four) {
  return sum((four[0].wide + four[1].wide) + (four[2].wide + four[3].wide)) + four[0].rest;
}
MLXSAE_INLINE float total(const Most* four) {
  Most most = four[0];
  for (int i = 1; i < 4; ++i) most.add(four[i].wide);
  return most.total();
}

struct Bfloats {
  static constexpr int kColumns = 3;
  static float scale(float) { return 1; }

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
  static constexpr int kFeatures = 6, kVectors = 4, kGroup = 2;  // a tile; coordinates multiplied at once
  using Accumulator = vf;

  static MLXSAE_INLINE vf multiply_add(vf sum, int32_t two, vi x) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(two), (__m512bh)x);
  }
  static MLXSAE_INLINE vf value(vf sum, vf, vf) { return sum; }
#endif
};

struct Integers {
  static constexpr int kColumns = 3;
  static constexpr float kUnit = 0x1p-15f;  // v_bar = q |v| kUnit

  static float scale(float full) { return full * kUnit; }

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
  static constexpr int kFeatures = 6, kVectors = 4, kGroup = 2;
#else
  static constexpr int kFeatures = 6, kVectors = 2, kGroup = 2;
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
  static MLXSAE_INLINE vf value(vi sum, vf of_row, vf of_column) {
    return __builtin_convertvector(sum, vf) * of_row * of_column;
  }
#endif
};

/** Eight bits of a token; of a weight the high byte of sixteen. */
struct Bytes {
  static constexpr int kColumns = 6;
  static constexpr float kUnit = 0x1.04p-15f;  // q |v| kUnit: |q| <= 2^15 / 1.015 fits in 127 units of at most 255

  typedef int8_t vb __attribute__((vector_size(kLanes)));

  template <class V>
  static MLXSAE_INLINE V nearest(V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) > 4) return (V)_mm512_roundscale_ps((__m512)v, 0);
#endif
    constexpr float kRound = 0x1.8p23f;  // adding it leaves no room for a fraction
    return (v + kRound) - kRound;
  }
#if defined(__AVX512BW__)
  /** The low bytes of 64 integers that fit in them. */
  static MLXSAE_INLINE __m512i bytes_of(const __m512i* v) {
    __m512i mixed = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), mixed);
  }
#endif
  template <class V>
  static MLXSAE_INLINE void put_bytes(int8_t* out, V whole) {
    if constexpr (sizeof(V) == 4) {
      *out = whole == whole ? static_cast<int8_t>(static_cast<int32_t>(whole)) : 0;
    } else {
      vb low = __builtin_convertvector(__builtin_convertvector(whole, vi), vb);
      std::memcpy(static_cast<void*>(out), &low, sizeof(low));
    }
  }

  /** A row of a shadow, its d high bytes and then its d low bytes, and its columns, `stride` apart. */
  static void shadow(const float* v, uint16_t* row, int64_t d, float* column, int64_t stride) {
    int8_t* out = reinterpret_cast<int8_t*>(row);
    Sum square[4];
    Most most[4];
    by_four(d, [&]<class V>(int64_t c, int i) __attribute__((always_inline)) {
      V x = get<V>(v + c);
      square[i].add(x * x), most[i].add(x);
    });
    Norm norm(d);
    // No integer is larger than what the largest number gives (or, should the two be rounded differently, than one
    // more): 2^15 / 1.015, which is 127 units, a unit at most 255.
    float full = norm(total(square)), scale = full * kUnit, inverse = 1 / scale;
    float top = nearest(total(most) * inverse);
    float unit = top > 126 ? __builtin_ceilf((top + 1) / 127) : 1, per_unit = 1 / unit, coarse = unit * scale;
    Sum rest[4];
    int64_t highs = 0, c = 0;
    // As whole = unit high + low.
    auto split = [&]<class V>(int64_t at, int i, V& high, V& low) __attribute__((always_inline)) {
      V x = get<V>(v + at), whole = nearest(x * inverse);
      high = nearest(whole * per_unit), low = whole - high * unit;
      V off = x - high * coarse;
      rest[i].add(off * off);
    };
#if defined(__AVX512BW__)
    __m512i sums = _mm512_setzero_si512();
    for (; c + 64 <= d; c += 64) {
      __m512i high[4], low[4];
      MLXSAE_UNROLL for (int i = 0; i < 4; ++i) {
        vf h, l;
        prefetch(v + d + c + i * kLanes);  // the next row
        split(c + i * kLanes, i, h, l);
        high[i] = _mm512_cvtps_epi32((__m512)h), low[i] = _mm512_cvtps_epi32((__m512)l);
      }
      __m512i h = bytes_of(high);
      sums =
          _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_xor_si512(h, _mm512_set1_epi8(-128)), _mm512_setzero_si512()));
      _mm512_storeu_si512(out + c, h), _mm512_storeu_si512(out + d + c, bytes_of(low));
    }
    highs = _mm512_reduce_add_epi64(sums) - 128 * c;
#endif
    lanes(d - c, [&]<class V>(int64_t at) __attribute__((always_inline)) {
      V high, low;
      split(c + at, 0, high, low);
      put_bytes(out + c + at, high), put_bytes(out + d + c + at, low);
    });
    for (; c < d; ++c) highs += out[c];
    float wide = norm(total(rest)), chain = Integers::chain(d);
    // Off by half an integer, and by what is lost of x / scale < 2^15; where that is not finite, `wide` is not.
    float fine = wide < INFINITY ? 0.51f * scale * __builtin_sqrtf(static_cast<float>(d)) * 1.0001f : wide;
    column[0] = full;
    column[stride] = (fine + chain * (full + fine)) * 1.0001f;  // |w_bar| <= |w| + |w - w_bar|
    column[2 * stride] = tiny(d, full, 0);
    column[3 * stride] = unit;
    column[4 * stride] = (wide + chain * (full + wide)) * 1.0001f;
    column[5 * stride] = static_cast<float>(highs);
  }

#if defined(__AVX512VNNI__)
  static constexpr int kFeatures = 6, kVectors = 4, kGroup = 4;
  using Accumulator = vi;

  /** A token v_bar = b scale, stored as b + 128: VNNI multiplies bytes without a sign by bytes with one. */
  static Rounded round(const float* v, float full, uint8_t* out, int64_t d, float& scale) {
    Most most;
    lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) { most.add(get<V>(v + c)); });
    float least = full * 1e-6f, top = most.total();  // a row of zeros has a scale too
    scale = (top > least ? top : least) / 127;
    float inverse = 1 / scale;
    Sum rest, low;
    lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) {
      V x = get<V>(v + c), b = nearest(x * inverse), y = b * scale;
      put_bytes(reinterpret_cast<int8_t*>(out + c), b + 128);
      rest.add((x - y) * (x - y)), low.add(y * y);
    });
    Norm norm(d);
    return {full, norm(rest.total()), norm(low.total())};
  }
  static MLXSAE_INLINE vi multiply_add(vi sum, int32_t four, vi x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)splat(four));
  }
  static MLXSAE_INLINE vf value(vi sum, vf of_row, vf of_column) {
    return __builtin_convertvector(sum, vf) * of_row * of_column;
  }
#endif
};

/** A row of a shadow of type Q, and its columns, `stride` apart. */
template <class Q>
inline void shadow_row(const float* w, uint16_t* row, int64_t d, float* column, int64_t stride) {
  if constexpr (std::is_same_v<Q, Bytes>) {
    Bytes::shadow(w, row, d, column, stride);
  } else {
    Rounded r = Q::round(w, row, d);
    column[0] = r.full;
    column[stride] = (r.rest + Q::chain(d) * r.low) * 1.0001f;
    column[2 * stride] = tiny(d, r.full, 0);
  }
}

/** The shadow of the rows [f0, f1) of an encoder, and the columns of the bound. */
inline void shadow(const float* w, int64_t d_sae, int64_t d, ShadowType type, uint16_t* out, float* columns, int64_t f0,
                   int64_t f1) {
  auto row = type == ShadowType::i8    ? shadow_row<Bytes>
             : type == ShadowType::i16 ? shadow_row<Integers>
                                       : shadow_row<Bfloats>;
  for (int64_t j = f0; j < f1; ++j) row(w + j * d, out + j * d, d, columns + j, d_sae);
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
  int64_t overflowed = 0;  // tokens

  __attribute__((noinline)) void cut(int64_t t) {
    int64_t m = counts[t];
    if (k == 0) return overflow(t);  // the bound is given, and there is no more room
    if (m < k) return;
    int32_t *key = keys + t * stride, *id = ids + t * stride;
    float* up = upper + t * stride;
    float b = from_key(kth_largest(key, m, k, to_key(bound[t])));
    if (b > bound[t]) bound[t] = b;
    int64_t o = 0;
    for (int64_t i = 0; i < m; ++i) {
      int32_t q = key[i], f = id[i];
      float u = up[i];
      key[o] = q, id[o] = f, up[o] = u;
      o += u >= bound[t];
    }
    counts[t] = static_cast<int32_t>(o);
    int64_t next = o + k / 4 + 8;
    limits[t] = static_cast<int32_t>(next < capacity ? next : capacity);
    if (o >= capacity) overflow(t);  // too many intervals overlap
  }
  /** The token goes to the float32 kernel. */
  MLXSAE_INLINE void overflow(int64_t t) {
    bound[t] = INFINITY;
    counts[t] = -1;
    ++overflowed;
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

/** The tokens of a task as a tile reads them. */
struct ScreenTokens {
  uint32_t* packed;            // [panels][groups][kVectors * kLanes] groups of coordinates
  float *scale, *row0, *row1;  // [tokens]
};

/** A feature as a tile reads it. */
struct ScreenColumn {
  float full, rest, absolute, bias, scale;
  int32_t start = 0;  // what the sum of integers starts with

  ScreenColumn() = default;
  /** Of a feature with these columns of the shadow, `stride` apart; `rest_at` names the one that bounds the rounding.
   */
  ScreenColumn(const float* columns, int64_t stride, int64_t rest_at, float b, float least, float unit)
      : full(columns[0]),
        rest(columns[rest_at * stride]),
        absolute(columns[2 * stride] + 2.4e-7f * (__builtin_fabsf(b) + __builtin_fabsf(least))),
        bias(b - least),
        scale(unit) {}
};

/** Rows of features, and memory to fetch meanwhile: `ahead`, as much of it for each of them, or null. */
struct ScreenRows {
  const char* w;
  int64_t stride;
  const char* ahead;
  int64_t ahead_bytes;
};

/** A pre-activation in low precision, and how far the float32 one may be from it. */
template <class V>
struct Interval {
  V at, error;
};

/**
 * M features against the tokens of panel p: take(i, t0, interval), with interval(v) for the tokens from t0 + v kLanes
 * on.
 */
template <class Q, int M, class Take>
__attribute__((noinline)) void tile(const ScreenTokens& tokens, int64_t d, const ScreenRows& rows,
                                    const ScreenColumn* columns, int64_t p, bool fetch, Take&& take) {
  constexpr int NV = Q::kVectors, W = NV * kLanes, G = Q::kGroup;
  const int64_t whole = d / G;
  const uint32_t* panel = tokens.packed + p * W * ((d + G - 1) / G);
  typename Q::Accumulator acc[M][NV];
  MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) {
      acc[i][v] = typename Q::Accumulator{};
      if constexpr (G == 4) acc[i][v] += columns[i].start;
    }
  }
  auto multiply_add = [&](int64_t c, int bytes) __attribute__((always_inline)) {
    vi x[NV];
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) x[v] =
        load(reinterpret_cast<const int32_t*>(panel) + c * W + v * kLanes);
    MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
      int32_t group = 0;
      std::memcpy(&group, rows.w + i * rows.stride + 4 * c, bytes);
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = Q::multiply_add(acc[i][v], group, x[v]);
    }
  };
  int64_t c = 0;
  for (; c + 16 <= whole; c += 16) {
    if (fetch) {
      const char* at = rows.ahead + 4 * c;
      for (int64_t part = 0; part < M * rows.ahead_bytes; part += 4 * whole) prefetch(at + part);
    }
    _Pragma("GCC unroll 4") for (int q = 0; q < 16; ++q) multiply_add(c + q, 4);
  }
  for (; c < whole; ++c) multiply_add(c, 4);
  if (d % G) multiply_add(c, static_cast<int>(d % G) * (4 / G));

  MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
    const ScreenColumn& column = columns[i];
    vf bias = splat(column.bias), scale = splat(column.scale);
    vf c0 = splat(column.full), c1 = splat(column.rest), c2 = splat(column.absolute);
    take(i, p * W, [&](int v) __attribute__((always_inline)) -> Interval<vf> {
      int64_t t = p * W + v * kLanes;
      return {Q::value(acc[i][v], load(tokens.scale + t), scale) + bias,
              load(tokens.row0 + t) * c0 + load(tokens.row1 + t) * c1 + c2};
    });
  }
}

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

/** Features whose rows are at hand together: two tiles, one of which finds a panel of tokens in the second-level cache
 * where it comes from the third. */
constexpr int kScreenTile = 6, kScreenBlock = 2 * kScreenTile;

/** The shadow that a screen multiplies: the given one, or rows that are made of the float32 ones as they are reached.
 */
template <class Q>
class ShadowRows {
 public:
  explicit ShadowRows(const Screen& s) : s_(s), stride_(s.w16 ? s.d_sae : kScreenBlock) {
    static thread_local Scratch mem;
    if (!s.w16) made_ = mem.get<uint16_t>(kScreenBlock * s.d);
  }
  /** The m features from f on, which those below are then about. */
  void reach(int64_t f, int m) {
    if (!made_) return;
    first_ = f;
    for (int i = 0; i < m; ++i) {
      shadow_row<Q>(s_.w + (f + i) * s_.d, made_ + i * s_.d, s_.d, columns_ + i, kScreenBlock);
      if (!(columns_[i] < 1e18f)) __atomic_store_n(s_.unusable, true, __ATOMIC_RELAXED);
      for (int c : {0, 2})  // every task says the same
        __atomic_store(s_.made + c * s_.d_sae + f + i, columns_ + c * kScreenBlock + i, __ATOMIC_RELAXED);
    }
  }
  const uint16_t* row(int64_t j) const { return made_ ? made_ + (j - first_) * s_.d : s_.w16 + j * s_.d; }
  float operator()(int64_t column, int64_t j) const { return of(j)[column * stride_]; }
  ScreenColumn column(int64_t j, int64_t rest_at, float unit) const {
    return {of(j), stride_, rest_at, s_.bias ? s_.bias[j] : 0.0f, s_.bounds ? s_.bounds[j] : 0.0f, unit};
  }
  /** The rows from f on, and what the features from `next` on come from; next < 0: nothing. */
  ScreenRows rows(int64_t f, int64_t next) const {
    const void* ahead = made_ ? static_cast<const void*>(s_.w + next * s_.d) : s_.w16 + next * s_.d;
    return {reinterpret_cast<const char*>(row(f)), 2 * s_.d, next < 0 ? nullptr : static_cast<const char*>(ahead),
            (made_ ? 4 : 2) * s_.d};
  }

 private:
  const float* of(int64_t j) const { return made_ ? columns_ + (j - first_) : s_.columns + j; }

  const Screen& s_;
  const int64_t stride_;
  uint16_t* made_ = nullptr;
  float columns_[Q::kColumns * kScreenBlock];
  int64_t first_ = 0;
};

/**
 * Features by blocks, in an order whose every beginning has features from everywhere: what was seen tells what is to
 * come, however a dictionary is sorted. The steps are the golden section of the whole.
 */
struct EvenWalk {
  static constexpr int kFeatures = kScreenBlock;

  const int64_t d_sae, whole = d_sae / kFeatures;  // blocks of that many; those after them are single features
  const int64_t blocks = whole + d_sae % kFeatures;
  int64_t step;

  explicit EvenWalk(int64_t n) : d_sae(n), step(static_cast<int64_t>(0.618034 * static_cast<double>(whole))) {
    auto common = [](int64_t a, int64_t b) {
      while (b) {
        int64_t rest = a % b;
        a = b, b = rest;
      }
      return a;
    };
    while (step < 1 || common(step, whole) > 1) ++step;
  }
  int64_t first(int64_t b) const { return b < whole ? b * step % whole * kFeatures : seen(b); }
  /** How many features the first b blocks have. */
  int64_t seen(int64_t b) const { return b < whole ? b * kFeatures : whole * kFeatures + (b - whole); }
};

/** What the screens of all types share: the tokens of a task and their lists. */
struct ScreenTask {
  static constexpr int kWidth = Integers::kVectors * kLanes;  // of a panel, whatever it holds

  const Screen& s;
  const int64_t n = s.t1 - s.t0, padded = (n + kWidth - 1) / kWidth * kWidth;
  const EvenWalk walk{s.d_sae};
  Intervals lists;
  bool started = false;

  explicit ScreenTask(const Screen& screen) : s(screen) {
    static thread_local Scratch mem[3];
    lists.capacity = s.capacity;
    lists.stride = (s.capacity + 16) / 16 * 16 + 16;
    lists.keys = mem[0].get<int32_t>(padded * (2 * lists.stride + 2));
    lists.ids = lists.keys + padded * lists.stride;
    lists.counts = lists.ids + padded * lists.stride;
    lists.limits = lists.counts + padded;
    lists.upper = mem[1].get<float>(padded * lists.stride);
    lists.bound = mem[2].get<float>(padded);
    for (int64_t t = 0; t < padded; ++t) {
      lists.counts[t] = 0;
      lists.bound[t] = t >= n ? INFINITY : s.k ? -INFINITY : s.floor;
    }
  }

  const float* row(int64_t t) const { return s.x + (s.t0 + t) * s.d; }

  /** Room for the tokens in groups of G coordinates; zero past the last one. */
  template <int G>
  ScreenTokens tokens(Scratch* mem) const {
    int64_t groups = (s.d + G - 1) / G;
    float* row = mem[0].get<float>(3 * padded);
    ScreenTokens to{mem[1].get<uint32_t>(padded * groups), row, row + padded, row + 2 * padded};
    for (int64_t t = n; t < padded; ++t) {
      to.scale[t] = to.row0[t] = to.row1[t] = 0;
      for (int64_t c = 0; c < groups; ++c) to.packed[(t / kWidth * groups + c) * kWidth + t % kWidth] = 0;
    }
    return to;
  }
  /** Token t: `numbers` in whole groups. */
  template <int G>
  void put(const ScreenTokens& to, int64_t t, const void* numbers, const Rounded& r, float scale) {
    int64_t groups = (s.d + G - 1) / G;
    uint32_t* at = to.packed + t / kWidth * groups * kWidth + t % kWidth;
    for (int64_t c = 0; c < groups; ++c) std::memcpy(&at[c * kWidth], static_cast<const char*>(numbers) + 4 * c, 4);
    s.norms[s.t0 + t] = r.full;
    bool fit = r.full < 1e18f;  // or NaN, infinite, or squares may overflow
    if (!fit) lists.counts[t] = -1, lists.bound[t] = INFINITY;
    to.scale[t] = fit ? scale : 0, to.row1[t] = fit ? r.low : 0;
    to.row0[t] = fit ? (r.rest + gamma_of(s.d) * r.full) * 1.0001f : 0;
  }

  /**
   * The blocks [b0, b1) of the walk by tiles of Q: rows(f, m, next) gives the rows of m features, and those from `next`
   * on follow, or none where it is below 0; column(j) gives a column, take(j, t0, interval) takes a tile's results and
   * done(f, m) follows on all panels.
   */
  template <class Q, class Rows, class ColumnOf, class Take, class Done>
  void scan(const ScreenTokens& x, int64_t b0, int64_t b1, Rows&& rows, ColumnOf&& column, Take&& take, Done&& done) {
    static_assert(Q::kVectors * kLanes == kWidth && Q::kFeatures == kScreenTile);
    auto block = [&]<int M>(std::integral_constant<int, M>, int64_t b) {
      int64_t f = walk.first(b);
      ScreenRows w = rows(f, M, b + 1 < walk.whole ? walk.first(b + 1) : -1);
      ScreenColumn columns[M];
      for (int i = 0; i < M; ++i) columns[i] = column(f + i);
      constexpr int kRows = M < kScreenTile ? M : kScreenTile;
      for (int64_t p = 0; p * kWidth < padded; ++p)
        for (int first = 0; first < M; first += kRows) {
          ScreenRows part{w.w + first * w.stride, w.stride, w.ahead ? w.ahead + first * w.ahead_bytes : nullptr,
                          w.ahead_bytes};
          tile<Q, kRows>(x, s.d, part, columns + first, p, p == 0 && w.ahead,
                         [&](int i, int64_t t0, auto&& interval)
                             __attribute__((always_inline)) { take(f + first + i, t0, interval); });
        }
      done(f, M);
    };
    int64_t b = b0;
    for (; b < b1 && b < walk.whole; ++b) block(std::integral_constant<int, EvenWalk::kFeatures>{}, b);
    for (; b < b1; ++b) block(std::integral_constant<int, 1>{}, b);
  }

  /** What may be among the k largest, or reach the floor, goes to the lists. */
  template <int NV, class At>
  MLXSAE_INLINE void list(int64_t j, int64_t t0, At&& interval) {
    uint32_t any = 0;
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) {
      auto [at, error] = interval(v);
      any |= at_least(at + error, load(lists.bound + t0 + v * kLanes));
    }
    if (__builtin_expect(any != 0, 0)) {
      vf lower[NV], up[NV];
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) {
        auto [at, error] = interval(v);
        lower[v] = at - error, up[v] = at + error;
      }
      emit_intervals<NV>(lists, lower, up, t0, static_cast<int32_t>(j));
    }
  }

  /**
   * Before the walk has seen the `seen` first features: of the k largest of a token it sees k seen / d_sae, and hardly
   * ever more than the number kept here, whose least is a bound (which finish() judges).
   */
  void aim(int64_t seen) {
    int64_t few = 2 * s.k * seen / s.d_sae + 8;
    lists.k = few < s.k ? few : s.k;
    if (started) return;
    started = true;
    int64_t next = 2 * lists.k + 16;
    for (int64_t t = 0; t < padded; ++t)
      lists.limits[t] = static_cast<int32_t>(s.k > 0 && next < lists.capacity ? next : lists.capacity);
  }

  /** So many tokens need the float32 kernel that all are left to it: the rest of the features changes nothing. */
  bool hopeless() const { return 8 * lists.overflowed > n; }
  /** After `seen` features, with a given floor: whether so many reach it that the lists are going to overflow. */
  void foresee(int64_t seen) {
    if (s.k > 0 || 16 * seen < s.d_sae) return;
    int64_t found = 0;
    for (int64_t t = 0; t < n; ++t) found += lists.counts[t] > 0 ? lists.counts[t] : 0;
    if (2 * found * s.d_sae > n * s.capacity * seen) lists.overflowed = n;
  }

  void finish() {
    bool nothing = hopeless();
    for (int64_t t = 0; t < n; ++t) {
      if (nothing) lists.counts[t] = -1;
      int32_t* to_ids = s.ids + (s.t0 + t) * s.capacity;
      int64_t m = lists.counts[t];
      if (s.k > 0) {
        // Certified: at least k lower ends reach the bound, so it is a true one.
        int64_t reach = 0;
        for (int64_t i = 0; i < m; ++i) reach += from_key(lists.keys[t * lists.stride + i]) >= lists.bound[t];
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
        s.upper[(s.t0 + t) * s.capacity + i] = from_key(lists.keys[at]) >= lists.bound[t] ? INFINITY : lists.upper[at];
      }
    }
  }
};

/** The screen of one task's tokens over all features (Screen in kernels.h), in 16 bits. */
template <class Q>
inline void screen(const Screen& s) {
  static thread_local Scratch mem[3];
  ScreenTask task(s);
  auto x = task.tokens<2>(mem);
  uint16_t* rounded = mem[2].get<uint16_t>(s.d + 2);
  for (int64_t t = 0; t < task.n; ++t) {
    rounded[s.d] = 0;
    Rounded r = Q::round(task.row(t), rounded, s.d);
    task.put<2>(x, t, rounded, r, Q::scale(r.full));
  }
  ShadowRows<Q> shadow(s);
  constexpr int64_t kWindow = 170;
  for (int64_t b = 0; b < task.walk.blocks && !task.hopeless();) {
    int64_t end = b + kWindow < task.walk.blocks ? b + kWindow : task.walk.blocks;
    task.aim(task.walk.seen(end));
    task.scan<Q>(
        x, b, end,
        [&](int64_t f, int m, int64_t next) {
          shadow.reach(f, m);
          return shadow.rows(f, next);
        },
        [&](int64_t j) { return shadow.column(j, 1, Q::scale(shadow(0, j))); },
        [&](int64_t j, int64_t t0, auto&& interval)
            __attribute__((always_inline)) { task.list<Q::kVectors>(j, t0, interval); },
        [](int64_t, int) {});
    b = end;
    task.foresee(task.walk.seen(b));
  }
  task.finish();
}

#if defined(__AVX512VNNI__)

/** The product in 16 bits of the feature with these bytes and N tokens: the unit times its high bytes, and its low
 * ones. */
template <int N>
inline void products(const int8_t* high, int64_t d, float unit, const uint16_t* const* x, int32_t* out) {
  __m512i units = _mm512_set1_epi16(static_cast<int16_t>(unit)), acc[N];
  for (int i = 0; i < N; ++i) acc[i] = _mm512_setzero_si512();
  auto multiply_add = [&](int64_t c, __m256i h, __m256i l) __attribute__((always_inline)) {
    __m512i q = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_cvtepi8_epi16(h), units), _mm512_cvtepi8_epi16(l));
    MLXSAE_UNROLL for (int i = 0; i < N; ++i) acc[i] = _mm512_dpwssd_epi32(acc[i], q, _mm512_loadu_si512(x[i] + c));
  };
  int64_t c = 0;
  for (; c + 32 <= d; c += 32)
    multiply_add(c, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + c)),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + d + c)));
  if (c < d) {
    __mmask32 there = (__mmask32{1} << (d - c)) - 1;
    multiply_add(c, _mm256_maskz_loadu_epi8(there, high + c), _mm256_maskz_loadu_epi8(there, high + d + c));
  }
  MLXSAE_UNROLL for (int i = 0; i < N; ++i) out[i] = _mm512_reduce_add_epi32(acc[i]);
}

/** The same by bytes, then in 16 bits what bytes cannot decide. */
template <>
inline void screen<Bytes>(const Screen& s) {
  constexpr int M = kScreenBlock, NV = Bytes::kVectors;
  static thread_local Scratch mem[8];
  ScreenTask task(s);
  auto& lists = task.lists;
  const int64_t d = s.d, n = task.n, width = (d + 31) / 32 * 32;
  auto x16 = task.tokens<2>(mem), x8 = task.tokens<4>(mem + 2);
  uint16_t* rows = mem[4].get<uint16_t>(n * width);
  uint8_t* bytes = mem[5].get<uint8_t>(d + 4);
  std::memset(bytes + d, 0, 4);
  for (int64_t t = 0; t < n; ++t) {
    uint16_t* row = rows + t * width;
    Rounded r = Integers::round(task.row(t), row, d);
    for (int64_t c = d; c < width; ++c) row[c] = 0;
    task.put<2>(x16, t, row, r, Integers::scale(r.full));
    float scale;
    Rounded coarse = Bytes::round(task.row(t), r.full, bytes, d, scale);
    task.put<4>(x8, t, bytes, coarse, scale);
  }
  ShadowRows<Bytes> shadow(s);
  auto high_of = [&](int64_t j) { return reinterpret_cast<const int8_t*>(shadow.row(j)); };
  auto unit_of = [&](int64_t j) { return shadow(3, j); };
  auto column16 = [&](int64_t j) { return shadow.column(j, 1, shadow(0, j) * Bytes::kUnit); };

  int16_t* whole = mem[6].get<int16_t>(M * width);
  auto integers = [&](int64_t b0, int64_t b1) {
    task.scan<Integers>(
        x16, b0, b1,
        [&](int64_t f, int m, int64_t) {
          shadow.reach(f, m);
          for (int i = 0; i < m; ++i) {
            const int8_t* high = high_of(f + i);
            int16_t unit = static_cast<int16_t>(unit_of(f + i));
            for (int64_t c = 0; c < d; ++c) whole[i * width + c] = static_cast<int16_t>(unit * high[c] + high[d + c]);
          }
          return ScreenRows{reinterpret_cast<const char*>(whole), 2 * width, nullptr, 0};
        },
        column16,
        [&](int64_t j, int64_t t0, auto&& interval) __attribute__((always_inline)) { task.list<NV>(j, t0, interval); },
        [](int64_t, int) {});
  };

  const int64_t room = task.padded + kLanes;
  int32_t *passed = mem[7].get<int32_t>(M * room), counts[M] = {};
  int64_t pairs = 0;
  auto decide = [&](int64_t j, const int32_t* tokens, int64_t m) {
    ScreenColumn column = column16(j);
    float unit = unit_of(j);
    auto some = [&]<int N>(std::integral_constant<int, N>, int64_t i) __attribute__((always_inline)) {
      const uint16_t* x[N];
      int32_t sums[N];
      for (int q = 0; q < N; ++q) x[q] = rows + tokens[i + q] * width;
      products<N>(high_of(j), d, unit, x, sums);
      for (int q = 0; q < N; ++q) {
        int64_t t = tokens[i + q];
        float at = static_cast<float>(sums[q]) * x16.scale[t] * column.scale + column.bias;
        float error = x16.row0[t] * column.full + x16.row1[t] * column.rest + column.absolute;
        if (at + error >= lists.bound[t]) lists.add(t, at - error, at + error, static_cast<int32_t>(j));
      }
    };
    int64_t i = 0;
    for (; i + 8 <= m; i += 8) some(std::integral_constant<int, 8>{}, i);
    [&]<int... N>(std::integer_sequence<int, N...>) {
      ((m - i == N + 1 ? some(std::integral_constant<int, N + 1>{}, i) : void()), ...);
    }(std::make_integer_sequence<int, 7>{});
  };
  auto by_bytes = [&](int64_t b0, int64_t b1) {
    int64_t first = 0;
    pairs = 0;
    task.scan<Bytes>(
        x8, b0, b1,
        [&](int64_t f, int m, int64_t next) {
          first = f;
          shadow.reach(f, m);
          return shadow.rows(f, next);
        },
        [&](int64_t j) {
          ScreenColumn c = shadow.column(j, 4, shadow(0, j) * Bytes::kUnit * unit_of(j));
          float highs = shadow(5, j);
          c.start =
              __builtin_fabsf(highs) < 0x1p24f ? -128 * static_cast<int32_t>(highs) : 0;  // of NaN nothing is used
          return c;
        },
        [&](int64_t j, int64_t t0, auto&& interval) __attribute__((always_inline)) {
          // Without a branch: of sixteen tokens one passes in every third or fourth, in no order to be foreseen.
          int64_t i = j - first;
          int32_t *to = passed + i * room, count = counts[i];
          __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(t0)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
          MLXSAE_UNROLL for (int v = 0; v < NV; ++v) {
            auto [at, error] = interval(v);
            auto mask = static_cast<__mmask16>(at_least(at + error, load(lists.bound + t0 + v * kLanes)));
            _mm512_storeu_si512(to + count, _mm512_maskz_compress_epi32(mask, ids));
            count += __builtin_popcount(mask);
            ids = _mm512_add_epi32(ids, _mm512_set1_epi32(kLanes));
          }
          counts[i] = count;
        },
        [&](int64_t f, int m) {
          for (int i = 0; i < m; ++i) {
            decide(f + i, passed + i * room, counts[i]);
            pairs += counts[i], counts[i] = 0;
          }
        });
  };

  constexpr int64_t kWindow = 16;
  const EvenWalk& walk = task.walk;
  // Integers before block `turn`, bytes from there on. Without a bound every pair passes; and the sums of bytes,
  // 127^2 d at most, must fit in 32 bits.
  int64_t b = 0, turn = d > 1 << 17 ? walk.blocks : s.k > 0 ? walk.blocks / 64 + 1 : 0;
  while (b < walk.blocks && !task.hopeless()) {
    int64_t end = b + kWindow < walk.blocks ? b + kWindow : walk.blocks;
    task.aim(walk.seen(end));
    if (b < turn) {
      integers(b, end);
    } else {
      by_bytes(b, end);
      if (4 * pairs > n * (walk.seen(end) - walk.seen(b))) turn = end + 8 * kWindow;
    }
    b = end;
    task.foresee(walk.seen(b));
  }
  task.finish();
}

#endif

#endif

}  // namespace mlxsae::cpu::MLXSAE_ISA
