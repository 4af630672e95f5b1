#pragma once
// Adam on a thread's numbers of a row. M, the type in which moments are kept, is float or bfloat; arithmetic is in
// float32 either way.

#include "common/rounding.h"

struct Adam {
  float beta1, beta2, eps, step_size, inverse, clip;
  bool live;
  uint seed;
};

/** One step on V numbers with gradient clip * g: moments are stored, the new weights returned. Not live: all as it was.
 */
template <int V, typename M>
METAL_FUNC Lanes<V> adam_piece(const thread Adam& a, bool live, Lanes<V> w, Lanes<V> g, const device M* m,
                               const device M* v, device M* m_out, device M* v_out, uint place = 0) {
  g *= a.clip;
  const Lanes<V> old_m = load<M, V>(m), old_v = load<M, V>(v);
  const Lanes<V> new_m = a.beta1 * old_m + (1.0f - a.beta1) * g;
  const Lanes<V> new_v = a.beta2 * old_v + (1.0f - a.beta2) * (g * g);
  store_moments<M, V>(m_out, v_out, live ? new_m : old_m, live ? new_v : old_v, place);
  const Lanes<V> new_w = w - a.step_size * new_m / (precise::sqrt(new_v) * a.inverse + a.eps);
  return live ? new_w : w;
}

/** The noise of a row of w_enc, of w_dec. */
METAL_FUNC uint noise_enc(const thread Adam& a, uint j) { return noise_key(2 * a.seed, j); }
METAL_FUNC uint noise_dec(const thread Adam& a, uint j) { return noise_key(2 * a.seed + 1, j); }

/** Numbers first, first + stride, ... of a row at `row` and of its moments, to where the new ones stand if that is
 * another memory. */
template <int V, typename M>
METAL_FUNC void copy_row(const device float* w, const device M* m, const device M* v, device float* w_out,
                         device M* m_out, device M* v_out, ulong row, uint d, uint first, uint stride) {
  if (w == w_out && m == m_out && v == v_out) return;
  for (uint c = first; c < d; c += stride) {
    store<float, V>(w_out + row + c, load<float, V>(w + row + c));
    store<M, V>(m_out + row + c, load<M, V>(m + row + c));
    store<M, V>(v_out + row + c, load<M, V>(v + row + c));
  }
}
