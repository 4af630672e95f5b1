#pragma once
// Certified low precision: the product in bfloat16, and an interval around each result that the float32 result of the
// encode kernel cannot leave. With u = 2^-24, bars for the bfloat16 roundings, and gamma = 2 (d + 16) u (twice the worst
// rounding of d + 16 additions, so that truncating hardware is covered as well):
//
//   |s - s_bar| <= |x - x_bar| |w| + |x_bar| |w - w_bar|              Cauchy-Schwarz on the two roundings
//                + gamma |x| |w| + gamma |x_bar| |w_bar|              rounding of both chains
//                + 4 u |b| + tiny                                     rounding of the bias; subnormals flushed to zero
//                =  row[0] col[0] + row[1] col[1] + col[2]
//
// Every norm is rounded up. A feature can be among the k largest only if its upper end reaches the k-th largest lower
// end; those features are computed again, in the very order of the encode kernel, so the codes are its bits.

#include "cpu/kernel_update.h"

namespace mlxsae::cpu::MLXSAE_ISA {

/** Room for d flushed products and inputs of 2^-126. */
MLXSAE_INLINE float tiny(int64_t d, float a, float b) { return 4e-38f * static_cast<float>(d) * (1 + a + b); }

struct Rounded {
  float full, rest, low;  // |v|, |v - v_bar|, |v_bar|, each rounded up
};

/** One row to bfloat16, with its norms. */
inline Rounded round_row(const float* v, bf16* out, int64_t d) {
  Sum full, rest, low;
  lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) {
    V x = get<V>(v + c), y;
    if constexpr (sizeof(V) == 4) {
      bf16 h = from_float<bf16>(x);
      out[c] = h;
      y = to_float(h);
    } else {
      vi bits = (vi)x;
      vi nan = x != x;
      vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
      vi kept = (nan & (bits | 0x400000)) | (~nan & rounded);
      kept &= splat(int32_t(0xffff0000));
      for (int i = 0; i < kLanes; ++i) out[c + i].bits = static_cast<uint16_t>(static_cast<uint32_t>(kept[i]) >> 16);
      y = (V)kept;
    }
    full.add(x * x), rest.add((x - y) * (x - y)), low.add(y * y);
  });
  float up = 1 + 1e-5f + static_cast<float>(d) * 6e-8f;
  auto norm = [up](float square) { return __builtin_sqrtf(square) * up; };
  return {norm(full.total()), norm(rest.total()), norm(low.total())};
}

MLXSAE_INLINE float gamma_of(int64_t d) { return 2 * static_cast<float>(d + 16) * 5.97e-8f; }

/** bfloat16 rows [f0, f1) of an encoder, and the columns [3, d_sae] of the bound. */
inline void shadow(const float* w, int64_t d_sae, int64_t d, uint16_t* out, float* columns, int64_t f0, int64_t f1) {
  for (int64_t j = f0; j < f1; ++j) {
    Rounded r = round_row(w + j * d, reinterpret_cast<bf16*>(out + j * d), d);
    columns[j] = r.full;
    columns[d_sae + j] = (r.rest + gamma_of(d) * r.low) * 1.0001f;
    columns[2 * d_sae + j] = tiny(d, r.full, 0);
  }
}

/** Four to eight dot products at once, each one chain over ascending coordinates: the bits of the encode kernel. */
template <int N>
MLXSAE_INLINE void chains(const float* const* a, const float* const* b, const float* bias, int64_t d, float* out) {
  float s[N] = {};
  for (int64_t c = 0; c < d; ++c) {
    MLXSAE_UNROLL for (int i = 0; i < N; ++i) s[i] = __builtin_fmaf(a[i][c], b[i][c], s[i]);
  }
  for (int i = 0; i < N; ++i) out[i] = s[i] + bias[i];
}

/** out[e] = <x[rows[e]], w[ids[e]]> + bias[ids[e]] in the order of the encode kernel, for entries sorted by feature. */
inline void rescore(const Rescore& r, int64_t begin, int64_t end) {
  constexpr int N = 8;
  for (int64_t e = begin; e < end; e += N) {
    const float *a[N], *b[N];
    float bias[N], out[N];
    int64_t m = end - e < N ? end - e : N;
    for (int i = 0; i < N; ++i) {
      int64_t q = e + (i < m ? i : 0);
      a[i] = r.x + int64_t(r.rows[q]) * r.d;
      b[i] = r.w + int64_t(r.ids[q]) * r.d;
      bias[i] = r.bias ? r.bias[r.ids[q]] : 0.0f;
    }
    chains<N>(a, b, bias, r.d, out);
    for (int64_t i = 0; i < m; ++i) r.out[e + i] = out[i];
  }
}

/** Fast dot products of the same entries, in any order of additions. */
inline void estimate(const Rescore& r, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) {
    if (e + 1 < end) {
      const float* ahead = r.x + int64_t(r.rows[e + 1]) * r.d;
      for (int64_t c = 0; c < r.d; c += 16) prefetch<2>(ahead + c);
    }
    float s = dot(r.x + int64_t(r.rows[e]) * r.d, r.w + int64_t(r.ids[e]) * r.d, r.d);
    r.out[e] = s + (r.bias ? r.bias[r.ids[e]] : 0.0f);
  }
}

#if defined(__AVX512BF16__)

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
    if (o >= capacity) {  // too many intervals overlap: the token goes to the float32 kernel
      bound[t] = INFINITY;
      counts[t] = -1;
    }
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

/** The screen of one task's tokens over all features (Screen in kernels.h). */
inline void screen(const Screen& s) {
  constexpr int MR = 6, NV = 4, W = NV * kLanes;
  static thread_local Scratch mem[6];
  const int64_t n = s.t1 - s.t0, d = s.d, pairs = (d + 1) / 2, panels = (n + W - 1) / W, padded = panels * W;
  uint32_t* packed = mem[0].get<uint32_t>(padded * pairs);
  float* row = mem[1].get<float>(3 * padded);
  float *row0 = row, *row1 = row + padded, *bound = row + 2 * padded;
  bf16* rounded = mem[2].get<bf16>(d + 2);
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
    bound[t] = there ? -INFINITY : INFINITY;
    row0[t] = row1[t] = 0;
    if (!there) {
      for (int64_t c = 0; c < pairs; ++c) to[c * W] = 0;
      continue;
    }
    rounded[d].bits = 0;
    Rounded r = round_row(s.x + (s.t0 + t) * d, rounded, d);
    for (int64_t c = 0; c < pairs; ++c) std::memcpy(&to[c * W], rounded + 2 * c, 4);
    row0[t] = (r.rest + gamma_of(d) * r.full) * 1.0001f;
    row1[t] = r.low;
    s.norms[s.t0 + t] = r.full;
    if (!(r.full < 1e18f)) lists.counts[t] = -1, bound[t] = INFINITY;  // NaN, infinite, or squares that may overflow
  }

  auto emit_all = [&](const vf* lower, const vf* up, int64_t t0, int32_t feature) __attribute__((noinline)) {
    for (int v = 0; v < NV; ++v) {
      uint32_t mask = _mm512_cmp_ps_mask((__m512)up[v], (__m512)load(bound + t0 + v * kLanes), _CMP_GE_OQ);
      while (mask) {
        int lane = __builtin_ctz(mask);
        mask &= mask - 1;
        lists.add(t0 + v * kLanes + lane, lower[v][lane], up[v][lane], feature);
      }
    }
  };
  auto tile16 = [&]<int M>(std::integral_constant<int, M>, int64_t f, int64_t p, bool ahead) __attribute__((always_inline)) {
    const uint16_t* w = s.w16 + f * d;
    const uint32_t* panel = packed + p * W * pairs;
    __m512 acc[M][NV];
    MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_setzero_ps();
    }
    auto step = [&](int64_t c, bool half) __attribute__((always_inline)) {
      __m512bh b[NV];
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) b[v] = (__m512bh)_mm512_loadu_si512(panel + c * W + v * kLanes);
      MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
        uint32_t two = 0;
        std::memcpy(&two, w + i * d + 2 * c, half ? 2 : 4);
        __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(two));
        MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], a, b[v]);
      }
    };
    int64_t c = 0, whole = d / 2;
    for (; c + 16 <= whole; c += 16) {
      if (ahead) {
        MLXSAE_UNROLL for (int i = 0; i < M; ++i) prefetch(w + (M + i) * d + 2 * c);
      }
      _Pragma("GCC unroll 4") for (int q = 0; q < 16; ++q) step(c + q, false);
    }
    for (; c < whole; ++c) step(c, false);
    if (d % 2) step(c, true);
    MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
      int64_t j = f + i;
      float bias = s.bias ? s.bias[j] : 0.0f;
      vf b = splat(bias), c0 = splat(s.columns[j]), c1 = splat(s.columns[s.d_sae + j]);
      vf c2 = splat(s.columns[2 * s.d_sae + j] + 2.4e-7f * __builtin_fabsf(bias));
      vf lower[NV], up[NV];
      uint32_t any = 0;
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) {
        int64_t t = p * W + v * kLanes;
        vf e = load(row0 + t) * c0 + load(row1 + t) * c1 + c2;
        vf a = (vf)acc[i][v] + b;
        lower[v] = a - e, up[v] = a + e;
        any |= _mm512_cmp_ps_mask((__m512)up[v], (__m512)load(bound + t), _CMP_GE_OQ);
      }
      if (__builtin_expect(any != 0, 0)) emit_all(lower, up, p * W, static_cast<int32_t>(j));
    }
  };
  auto scan16 = [&](int64_t f0, int64_t f1) {
    int64_t f = f0;
    for (; f + MR <= f1; f += MR)
      for (int64_t p = 0; p < panels; ++p)
        tile16(std::integral_constant<int, MR>{}, f, p, p == 0 && f + 2 * MR <= s.d_sae);
    for (; f < f1; ++f)
      for (int64_t p = 0; p < panels; ++p) tile16(std::integral_constant<int, 1>{}, f, p, false);
  };
  auto start = [&](int64_t k) {
    lists.k = k;
    for (int64_t t = 0; t < padded; ++t) {
      int64_t next = (lists.counts[t] > 0 ? lists.counts[t] : 0) + 2 * k + 16;
      lists.limits[t] = static_cast<int32_t>(next < lists.capacity ? next : lists.capacity);
    }
  };
  int64_t f = 0;
  if (s.d_sae >= 4096 && s.k * 32 <= s.d_sae) {  // a first bound from a sixteenth of the features, as in encode
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
    // Certified: at least k lower ends reach the bound, so it is a true one.
    int64_t reach = 0;
    for (int64_t i = 0; i < m; ++i) reach += from_key(lists.keys[t * lists.stride + i]) >= bound[t];
    if (m >= s.k && (reach >= s.k)) {
      lists.cut(t);
      m = lists.counts[t];
    } else {
      m = -1;
    }
    s.counts[s.t0 + t] = static_cast<int32_t>(m);
    if (m > 0) std::memcpy(to_ids, lists.ids + t * lists.stride, m * sizeof(int32_t));
  }
}

#endif

}  // namespace mlxsae::cpu::MLXSAE_ISA
