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

#include <type_traits>

#include "cpu/kernel_rounding.h"
#include "cpu/kernel_sparse.h"

namespace mlxsae::cpu::MLXSAE_ISA {

/** One Adam step on d numbers with moments of type M, whose noise begins at `place`; returns |w|^2 after it. g null:
 * the gradient is zero. */
template <bool kGradient, class M>
MLXSAE_INLINE float adam_numbers(float* w, M* m, M* v, uint32_t place, const float* g, float clip, const Adam& a,
                                 int64_t d) {
  Sum norm;
  lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) {
    // The next feature's row follows this one in memory.
    prefetch<2>(w + d + c), prefetch<2>(m + d + c), prefetch<2>(v + d + c);
    V grad = kGradient ? clip * get<V>(g + c) : V{};
    V new_m = a.beta1 * get<V>(m + c) + (1 - a.beta1) * grad;
    V new_v = a.beta2 * get<V>(v + c) + (1 - a.beta2) * (grad * grad);
    V new_w = get<V>(w + c) - a.step_size * new_m / (sqrt(new_v) * a.inv_sqrt_bias + a.eps);
    put(w + c, new_w);
    if constexpr (sizeof(M) == 4) {
      put(m + c, new_m), put(v + c, new_v);
    } else {
      auto bits = noise<V>(place + static_cast<uint32_t>(c));
      put_bits(m + c, dithered(new_m, bits & 0xffffu)), put_bits(v + c, dithered(new_v, bits >> 16));
    }
    norm.add(new_w * new_w);
  });
  return norm.total();
}

/** The same on row j of a parameter with rows of d numbers. */
template <bool kGradient>
MLXSAE_INLINE float adam_row(const Param& p, int64_t j, const float* g, float clip, const Adam& a, int64_t d) {
  auto step = [&]<class M>(M* m, M* v) __attribute__((always_inline)) {
    return adam_numbers<kGradient>(p.w + j * d, m + j * d, v + j * d, noise_key(p.seed, static_cast<uint32_t>(j)), g,
                                   clip, a, d);
  };
  return p.moments == Type::f32 ? step(static_cast<float*>(p.m), static_cast<float*>(p.v))
                                : step(static_cast<bf16*>(p.m), static_cast<bf16*>(p.v));
}

/** A row whose squares add up to `square`, back to norm 1. */
MLXSAE_INLINE void renorm(float* w, float square, int64_t d) {
  if (!(square > 0)) return;
  float inverse = 1 / __builtin_sqrtf(square);
  lanes(d, [&]<class V>(int64_t c) __attribute__((always_inline)) { put(w + c, inverse * get<V>(w + c)); });
}

inline void adam_vector(const Param& p, const float* g, float clip, const Adam& a, int64_t d) {
  adam_row<true>(p, 0, g, clip, a, d);
}

inline void shadow(const float* w, int64_t d_sae, int64_t d, ShadowType type, uint16_t* out, float* columns, int64_t f0,
                   int64_t f1);

/** Gradients of one feature while its entries are gathered. */
struct Gathered {
  float *dec, *enc;  // rows of d_out and d_in floats, without a meaning while there are no entries
  float bias = 0;
  bool any = false;
  bool has_along = false;
  float along = 0;  // <dw_dec, w_dec>, where it is known
};

/** Entries that are gathered in one pass. */
constexpr int kTogether = 4;

/** Add kN entries from e on, one after the other, in one pass over each row; fetch the rows of n_ahead more. */
template <int kN, bool kFirst>
MLXSAE_INLINE void gather(const Update& u, const Term& term, const float* w_dec, int64_t e, int n_ahead, Gathered& to) {
  const int64_t d_in = u.d_in, d_out = u.d_out;
  const float *r[kN], *x[kN], *r_ahead[kTogether], *x_ahead[kTogether];
  float v[kN], dz[kN];
  MLXSAE_UNROLL for (int q = 0; q < kN; ++q) {
    int64_t t = term.by.rows[e + q];
    r[q] = term.residual + t * d_out, x[q] = u.x + t * d_in;
    v[q] = term.scale * term.by.values[e + q];
  }
  for (int q = 0; q < n_ahead; ++q) {
    int64_t t = term.by.rows[e + kN + q];
    r_ahead[q] = term.residual + t * d_out, x_ahead[q] = u.x + t * d_in;
  }
  Sum dot[kN];
  lanes(d_out, [&]<class V>(int64_t c) __attribute__((always_inline)) {
    V w = get<V>(w_dec + c), sum{};
    if constexpr (!kFirst) sum = get<V>(to.dec + c);
    for (int q = 0; q < n_ahead; ++q) prefetch<2>(r_ahead[q] + c);
    MLXSAE_UNROLL for (int q = 0; q < kN; ++q) {
      V g = get<V>(r[q] + c);
      dot[q].add(g * w);
      sum += v[q] * g;
    }
    put(to.dec + c, sum);
  });
  MLXSAE_UNROLL for (int q = 0; q < kN; ++q) {
    float along = dot[q].total();
    dz[q] = term.scale * along;
    to.bias += dz[q], to.along += v[q] * along;
  }
  to.has_along = true;
  lanes(d_in, [&]<class V>(int64_t c) __attribute__((always_inline)) {
    V sum{};
    if constexpr (!kFirst) sum = get<V>(to.enc + c);
    for (int q = 0; q < n_ahead; ++q) prefetch<2>(x_ahead[q] + c);
    MLXSAE_UNROLL for (int q = 0; q < kN; ++q) sum += dz[q] * get<V>(x[q] + c);
    put(to.enc + c, sum);
  });
}

/** Gather the entries [begin, end) of a feature, and fetch the rows of `next` more, unless that is below 0. */
inline void gather_all(const Update& u, const Term& term, const float* w_dec, int64_t begin, int64_t end, int64_t next,
                       Gathered& to) {
  for (int64_t e = begin; e < end; e += kTogether) {
    int64_t left = end - e, after = left > kTogether ? left - kTogether : next;
    int n_ahead = static_cast<int>(next < 0 ? 0 : after < kTogether ? after : kTogether);
    auto some = [&]<int N>(std::integral_constant<int, N>) {
      if (to.any)
        gather<N, false>(u, term, w_dec, e, n_ahead, to);
      else
        gather<N, true>(u, term, w_dec, e, n_ahead, to);
    };
    if (left >= 4)
      some(std::integral_constant<int, 4>{});
    else if (left == 3)
      some(std::integral_constant<int, 3>{});
    else if (left == 2)
      some(std::integral_constant<int, 2>{});
    else
      some(std::integral_constant<int, 1>{});
    to.any = true;
  }
}

/** What follows the gradients of feature j: projection, the sums over all features, Adam, the norm, the shadow. */
inline void finish(const Update& u, int64_t j, const Gathered& g, double& square) {
  const int64_t d_in = u.d_in, d_out = u.d_out;
  float* w_dec = u.w_dec.w + j * d_out;
  if (g.any) {
    float along = g.along;
    if (u.project && !g.has_along) along = dot(g.dec, w_dec, d_out);
    Sum sq;
    auto take_off = [&]<bool kProject>(std::bool_constant<kProject>) __attribute__((always_inline)) {
      lanes(d_out, [&]<class V>(int64_t c) __attribute__((always_inline)) {
        V e = get<V>(g.dec + c);
        if constexpr (kProject) {
          e -= along * get<V>(w_dec + c);
          put(g.dec + c, e);
        }
        sq.add(e * e);
      });
    };
    if (u.project)
      take_off(std::true_type());
    else if (u.square)
      take_off(std::false_type());
    if (u.square) {
      lanes(d_in,
            [&]<class V>(int64_t c) __attribute__((always_inline)) { sq.add(get<V>(g.enc + c) * get<V>(g.enc + c)); });
      square += static_cast<double>(sq.total()) + static_cast<double>(g.bias) * g.bias;
    }
    if (u.through_input) add_scaled(u.through_input, g.bias, u.w_enc.w + j * d_in, d_in);
  }
  if (u.norms_only) return;

  if (g.any || !u.keep_decoder) {
    float norm = g.any ? adam_row<true>(u.w_dec, j, g.dec, u.clip, u.adam, d_out)
                       : adam_row<false>(u.w_dec, j, nullptr, 1, u.adam, d_out);
    if (u.normalize) renorm(w_dec, norm, d_out);
  }
  if (!g.any && u.keep_encoder) return;
  if (g.any)
    adam_row<true>(u.w_enc, j, g.enc, u.clip, u.adam, d_in);
  else
    adam_row<false>(u.w_enc, j, nullptr, 1, u.adam, d_in);
  adam_row<true>(u.b_enc, j, &g.bias, u.clip, u.adam, 1);
  if (u.w16) shadow(u.w_enc.w, u.d_sae, d_in, u.shadow_type, u.w16, u.columns, j, j + 1);
}

/**
 * Features in a range. One that few tokens use is gathered and finished at once. Those that many use (dead ones under
 * AuxK, hot ones) wait for company: a few of them walk together from one block of tokens to the next, so that its rows
 * come into the second-level cache once for all of them. Either way each adds up its entries in ascending order.
 */
inline void update(const Update& u) {
  static thread_local Scratch mem;
  const int64_t d_in = u.d_in, d_out = u.d_out;
  const int64_t padded = (d_out + kLanes - 1) / kLanes * kLanes + (d_in + kLanes - 1) / kLanes * kLanes;
  const int64_t width = padded > 0 ? padded : kLanes;
  constexpr int64_t kCompany = 16, kMany = 64, kCacheBytes = 512 << 10;
  const int64_t fit = kCacheBytes / 4 / (4 * width), company = fit < 1 ? 1 : fit < kCompany ? fit : kCompany;
  const int64_t block = 8 + kCacheBytes / (4 * width);
  float* rows = mem.get<float>((1 + company) * width);
  auto scratch = [&](int64_t place) {
    float* dec = rows + place * width;
    return Gathered{dec, dec + (d_out + kLanes - 1) / kLanes * kLanes};
  };
  double square = 0;

  int64_t waiting[kCompany], n_waiting = 0;
  auto together = [&] {
    Gathered found[kCompany];
    for (int64_t i = 0; i < n_waiting; ++i) found[i] = scratch(1 + i);
    for (int q = 0; q < u.n_terms; ++q) {
      const ByFeature& by = u.terms[q].by;
      int64_t at[kCompany], left = 0;
      for (int64_t i = 0; i < n_waiting; ++i) at[i] = by.starts[waiting[i]], left += by.starts[waiting[i] + 1] - at[i];
      for (int64_t stop = block; left > 0; stop += block)
        for (int64_t i = 0; i < n_waiting; ++i) {
          int64_t j = waiting[i], begin = at[i], last = by.starts[j + 1];
          while (at[i] < last && by.rows[at[i]] < stop) ++at[i];
          gather_all(u, u.terms[q], u.w_dec.w + j * d_out, begin, at[i], -1, found[i]);
          left -= at[i] - begin;
        }
    }
    for (int64_t i = 0; i < n_waiting; ++i) finish(u, waiting[i], found[i], square);
    n_waiting = 0;
  };

  for (int64_t j = u.f0; j < u.f1; ++j) {
    if (u.apart && u.apart[j]) continue;
    int64_t n = 0;
    for (int q = 0; q < u.n_terms; ++q) n += u.terms[q].by.starts[j + 1] - u.terms[q].by.starts[j];
    if (n >= kMany) {
      waiting[n_waiting++] = j;
      if (n_waiting == company) together();
      continue;
    }
    Gathered found = scratch(0);
    for (int q = 0; q < u.n_terms; ++q) {
      const int64_t* starts = u.terms[q].by.starts + j;
      gather_all(u, u.terms[q], u.w_dec.w + j * d_out, starts[0], starts[1], j + 1 < u.f1 ? starts[2] - starts[1] : 0,
                 found);
    }
    finish(u, j, found, square);
  }
  if (n_waiting) together();
  if (u.square) *u.square += square;
}

inline void gather_apart(const Update& u, const Apart& a) {
  for (int64_t i = a.begin; i < a.end; ++i) {
    int64_t j = a.features[i];
    Gathered found{a.dec + i * a.dec_stride, a.enc + i * a.enc_stride};
    for (int q = 0; q < u.n_terms; ++q)
      gather_all(u, u.terms[q], u.w_dec.w + j * u.d_out, u.terms[q].by.starts[j], u.terms[q].by.starts[j + 1], 0,
                 found);
    if (!found.any) {
      std::memset(found.dec, 0, u.d_out * sizeof(float));
      std::memset(found.enc, 0, u.d_in * sizeof(float));
    }
    a.bias[i] = found.bias;
  }
}

inline void finish_apart(const Update& u, const Apart& a) {
  double square = 0;
  for (int64_t i = a.begin; i < a.end; ++i)
    finish(u, a.features[i], {a.dec + i * a.dec_stride, a.enc + i * a.enc_stride, a.bias[i], true}, square);
  if (u.square) *u.square += square;
}

/** The walk's own arithmetic on one row after another, each step while the row is at hand: its bits. */
inline void catch_up(const CatchUp& c) {
  Adam adam = c.adam;
  Param p = c.w_dec;
  for (int64_t j = c.f0; j < c.f1; ++j) {
    if (!c.rows[j]) continue;
    for (int64_t t = int64_t{c.last_step[j]} + 1; t <= c.step; ++t) {
      const float* correction = c.corrections + 2 * (c.n_corrections - 1 - (c.step - t));
      adam.step_size = correction[0], adam.inv_sqrt_bias = correction[1];
      if (adam.step_size != adam.step_size) continue;
      p.seed = 2 * static_cast<uint32_t>(t) + 1;  // noise_seed of w_dec
      float square = adam_row<false>(p, j, nullptr, 1, adam, c.d_out);
      if (c.normalize) renorm(p.w + j * c.d_out, square, c.d_out);
    }
    if (c.last_step[j] < c.step) c.last_step[j] = c.step;
  }
}

inline void subtract(const float* target, int64_t d, float* residual, float* square, int64_t t0, int64_t t1) {
  for (int64_t t = t0; t < t1; ++t) {
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

inline void residual(const Code& code, const float* w, const float* bias, const float* target, int64_t d,
                     float* residual, float* square, int64_t t0, int64_t t1) {
  Rows rows{w, Type::f32, 0, d};
  for (int64_t t = t0; t < t1; ++t) {
    decode(code, rows, bias, Type::f32, residual, Type::f32, t, t + 1);
    subtract(target, d, residual, square, t, t + 1);
  }
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
