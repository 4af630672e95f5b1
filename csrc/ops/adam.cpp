#include "ops/adam.h"

#include <cmath>

namespace mlxsae {
namespace {

mx::array bits(uint32_t v) { return mx::array(v, mx::uint32); }

/** As csrc/cpu/kernel_rounding.h. */
mx::array scattered(mx::array x, mx::Stream s) {
  auto fold = [&](int by) { return mx::bitwise_xor(x, mx::right_shift(x, bits(by), s), s); };
  x = mx::multiply(fold(16), bits(0x7feb352d), s);
  x = mx::multiply(fold(15), bits(0x846ca68b), s);
  return fold(16);
}

/** Moments as they are kept: `moment` (0: first, 1: second) [d_sae, d] of a matrix in bfloat16, by stochastic rounding.
 */
mx::array kept(const mx::array& value, mx::Dtype type, uint32_t seed, int moment, mx::Stream s) {
  if (type == mx::float32) return value;
  auto rows = mx::reshape(mx::arange(0, value.shape(0), mx::uint32, s), {-1, 1}, s);
  auto key = scattered(mx::bitwise_xor(scattered(bits(seed), s), rows, s), s);
  auto noise = scattered(mx::add(key, mx::arange(0, value.shape(1), mx::uint32, s), s), s);
  noise = moment == 0 ? mx::bitwise_and(noise, bits(0xffff), s) : mx::right_shift(noise, bits(16), s);
  auto moved = mx::bitwise_and(mx::add(mx::view(value, mx::uint32, s), noise, s), bits(0xffff0000), s);
  return mx::astype(mx::where(mx::isnan(value, s), value, mx::view(moved, mx::float32, s), s), type, s);
}

}  // namespace

BiasCorrection bias_correction(float lr, float beta1, float beta2, int step) {
  auto t = static_cast<float>(step);
  return {lr / (1 - std::pow(beta1, t)), 1 / std::sqrt(1 - std::pow(beta2, t))};
}

void check_moments(const char* op, mx::Dtype moments) {
  if (moments != mx::float32 && moments != mx::bfloat16)
    fail(op, "moments of w_enc and w_dec must be float32 or bfloat16 but got ", moments, ".");
}

Arrays adam_graph(const mx::array& w, const mx::array& m, const mx::array& v, const mx::array& g, const AdamOptions& o,
                  mx::Stream s) {
  auto old_m = mx::astype(m, mx::float32, s), old_v = mx::astype(v, mx::float32, s);
  auto new_m = mx::add(mx::multiply(mx::array(o.beta1), old_m, s), mx::multiply(mx::array(1 - o.beta1), g, s), s);
  auto new_v =
      mx::add(mx::multiply(mx::array(o.beta2), old_v, s), mx::multiply(mx::array(1 - o.beta2), mx::square(g, s), s), s);
  auto denominator =
      mx::add(mx::multiply(mx::sqrt(new_v, s), mx::array(o.correction.inv_sqrt_bias), s), mx::array(o.eps), s);
  auto new_w =
      mx::subtract(w, mx::divide(mx::multiply(mx::array(o.correction.step_size), new_m, s), denominator, s), s);
  if (o.normalize) {
    auto length = mx::sqrt(mx::sum(mx::square(new_w, s), 1, true, s), s);
    new_w = mx::divide(new_w, mx::where(mx::greater(length, mx::array(0.0f), s), length, mx::array(1.0f), s), s);
  }
  return {new_w, kept(new_m, m.dtype(), o.seed, 0, s), kept(new_v, v.dtype(), o.seed, 1, s)};
}

}  // namespace mlxsae
