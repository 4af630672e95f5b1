#pragma once
// The backward pass and the optimiser in one walk over the features. For feature j with entries (t, v), v > 0:
//
//   dz_t    = <g_t, w_dec[j]>                 g_t = scale * residual_t
//   dw_dec  = sum v g_t                       dw_enc = sum dz_t x_t        db_enc = sum dz_t
//   dw_dec -= <dw_dec, w_dec[j]> w_dec[j]     where projection is asked for
//   Adam on w_dec[j], w_enc[j], b_enc[j];     w_dec[j] /= |w_dec[j]| where the norm is kept
//
// A row's gradients live in the first-level cache, never in memory: per feature the walk reads and writes both rows and
// their moments once, and gathers g and x. Entries come in ascending order of t, so the result does not depend on the
// number of threads.

#include "cpu/kernel_sparse.h"

namespace mlxsae::cpu::MLXSAE_ISA {

template <class V>
MLXSAE_INLINE V get(const float* p) {
  if constexpr (sizeof(V) == 4)
    return *p;
  else
    return load(p);
}
MLXSAE_INLINE void put(float* p, float v) { *p = v; }
MLXSAE_INLINE void put(float* p, vf v) { store(p, v); }
MLXSAE_INLINE float sqrt(float v) { return __builtin_sqrtf(v); }

/** body.operator()<V>(c) over [0, d): whole vectors, then single floats. */
template <class Body>
MLXSAE_INLINE void lanes(int64_t d, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) body.template operator()<vf>(c);
  for (; c < d; ++c) body.template operator()<float>(c);
}

/** A sum that has a part in vectors and a part in single floats. */
struct Sum {
  vf wide{};
  float rest = 0;
  MLXSAE_INLINE void add(vf v) { wide += v; }
  MLXSAE_INLINE void add(float v) { rest += v; }
  MLXSAE_INLINE float total() const { return sum(wide) + rest; }
};

/** One Adam step on a row; returns |w|^2 after it. g null: the gradient is zero. */
template <bool kGradient>
MLXSAE_INLINE float adam_row(const Param& p, const float* g, float clip, const Adam& a, int64_t d) {
  Sum norm;
  lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) {
    // The next feature's row follows this one in memory.
    prefetch<2>(p.w + d + c), prefetch<2>(p.m + d + c), prefetch<2>(p.v + d + c);
    V grad = kGradient ? clip * get<V>(g + c) : V{};
    V m = a.beta1 * get<V>(p.m + c) + (1 - a.beta1) * grad;
    V v = a.beta2 * get<V>(p.v + c) + (1 - a.beta2) * (grad * grad);
    V w = get<V>(p.w + c) - a.step_size * m / (sqrt(v) * a.inv_sqrt_bias + a.eps);
    put(p.m + c, m), put(p.v + c, v), put(p.w + c, w);
    norm.add(w * w);
  });
  return norm.total();
}

MLXSAE_INLINE Param row_of(const Param& p, int64_t offset) { return {p.w + offset, p.m + offset, p.v + offset}; }

inline void adam_vector(const Param& p, const float* g, float clip, const Adam& a, int64_t d) {
  adam_row<true>(p, g, clip, a, d);
}

inline void shadow(const float* w, int64_t d_sae, int64_t d, uint16_t* out, float* columns, int64_t f0, int64_t f1);

inline void update(const Update& u) {
  static thread_local Scratch mem;
  const int64_t d_in = u.d_in, d_out = u.d_out;
  float* g_dec = mem.get<float>(d_in + d_out + 2 * kLanes);
  float* g_enc = g_dec + (d_out + kLanes - 1) / kLanes * kLanes;
  double square = 0;

  for (int64_t j = u.f0; j < u.f1; ++j) {
    Param dec = row_of(u.w_dec, j * d_out), enc = row_of(u.w_enc, j * d_in), bias = row_of(u.b_enc, j);
    bool any = false;
    float db = 0;
    for (int q = 0; q < u.n_terms; ++q) {
      const Term& term = u.terms[q];
      for (int64_t e = term.by.starts[j]; e < term.by.starts[j + 1]; ++e) {
        float value = term.by.values[e];
        if (value <= 0) continue;  // not chosen, or cut off by the relu; NaN passes
        int64_t t = term.by.rows[e], ahead = term.by.rows[e + 1];
        const float *r = term.residual + t * d_out, *r_ahead = term.residual + ahead * d_out;
        float v = term.scale * value;
        Sum dz_sum;
        if (!any) {
          lanes(d_out, [&]<class V>(int64_t c) __attribute__((always_inline)) {
            prefetch<2>(r_ahead + c);
            V g = get<V>(r + c);
            dz_sum.add(g * get<V>(dec.w + c));
            put(g_dec + c, v * g);
          });
        } else {
          lanes(d_out, [&]<class V>(int64_t c) __attribute__((always_inline)) {
            prefetch<2>(r_ahead + c);
            V g = get<V>(r + c);
            dz_sum.add(g * get<V>(dec.w + c));
            put(g_dec + c, get<V>(g_dec + c) + v * g);
          });
        }
        float dz = term.scale * dz_sum.total();
        db += dz;
        const float *x = u.x + t * d_in, *x_ahead = u.x + ahead * d_in;
        if (!any) {
          lanes(d_in, [&]<class V>(int64_t c) __attribute__((always_inline)) {
            prefetch<2>(x_ahead + c);
            put(g_enc + c, dz * get<V>(x + c));
          });
        } else {
          lanes(d_in, [&]<class V>(int64_t c) __attribute__((always_inline)) {
            prefetch<2>(x_ahead + c);
            put(g_enc + c, get<V>(g_enc + c) + dz * get<V>(x + c));
          });
        }
        any = true;
      }
    }

    if (any) {
      if (u.project) {
        Sum along;
        lanes(d_out, [&]<class V>(int64_t c)
                         __attribute__((always_inline)) { along.add(get<V>(g_dec + c) * get<V>(dec.w + c)); });
        float s = along.total();
        lanes(d_out, [&]<class V>(int64_t c)
                         __attribute__((always_inline)) { put(g_dec + c, get<V>(g_dec + c) - s * get<V>(dec.w + c)); });
      }
      if (u.square) {
        Sum sq;
        lanes(d_out, [&]<class V>(int64_t c)
                         __attribute__((always_inline)) { sq.add(get<V>(g_dec + c) * get<V>(g_dec + c)); });
        lanes(d_in, [&]<class V>(int64_t c)
                        __attribute__((always_inline)) { sq.add(get<V>(g_enc + c) * get<V>(g_enc + c)); });
        square += static_cast<double>(sq.total()) + static_cast<double>(db) * db;
      }
      if (u.through_input) add_scaled(u.through_input, db, enc.w, d_in);
    }
    if (u.norms_only) continue;

    float norm =
        any ? adam_row<true>(dec, g_dec, u.clip, u.adam, d_out) : adam_row<false>(dec, nullptr, 1, u.adam, d_out);
    if (u.normalize && norm > 0) {
      float inverse = 1 / __builtin_sqrtf(norm);
      lanes(d_out,
            [&]<class V>(int64_t c) __attribute__((always_inline)) { put(dec.w + c, inverse * get<V>(dec.w + c)); });
    }
    if (any)
      adam_row<true>(enc, g_enc, u.clip, u.adam, d_in);
    else
      adam_row<false>(enc, nullptr, 1, u.adam, d_in);
    adam_row<true>(bias, &db, u.clip, u.adam, 1);
    if (u.w16) shadow(u.w_enc.w, u.d_sae, d_in, u.w16, u.columns, j, j + 1);
  }
  if (u.square) *u.square += square;
}

inline void residual(const Code& code, const float* w, const float* bias, const float* target, int64_t d,
                     float* residual, float* square, int64_t t0, int64_t t1) {
  Rows rows{w, Type::f32, 0, d};
  for (int64_t t = t0; t < t1; ++t) {
    decode(code, rows, bias, Type::f32, residual, Type::f32, t, t + 1);
    float* r = residual + t * d;
    Sum sq;
    lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) {
      V e = get<V>(r + c) - get<V>(target + t * d + c);
      put(r + c, e);
      sq.add(e * e);
    });
    square[t] = sq.total();
  }
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
