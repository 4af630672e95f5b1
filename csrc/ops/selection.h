#pragma once
// What the encoders share: their checks, and selection in plain MLX ops.

#include "gpu/encode.h"
#include "ops/common.h"

namespace mlxsae {

/** Throws unless x [n, d_in], w_enc [d_sae, d_in] and b_enc [d_sae] fit; returns d_sae. */
inline int check_encoder(const char* op, const mx::array& x, const mx::array& w_enc,
                         const std::optional<mx::array>& b_enc) {
  check_matrix(op, "x", x);
  check_matrix(op, "w_enc", w_enc);
  int d_sae = w_enc.shape(0);
  if (x.shape(1) != w_enc.shape(1))
    fail(op, "x [n, d_in] and w_enc [d_sae, d_in] must share d_in but got ", x.shape(), " and ", w_enc.shape(), ".");
  if (b_enc) check_vector(op, "b_enc", *b_enc, d_sae, "d_sae");
  return d_sae;
}

inline mx::array bias_or_zeros(const std::optional<mx::array>& b_enc, int d_sae, mx::Stream s) {
  return b_enc ? mx::astype(*b_enc, mx::float32, s) : mx::zeros({d_sae}, mx::float32, s);
}

/** The framework's product on a GPU wants operands of one type: x and w_enc become the promoted one. */
inline void one_type_on_gpu(Arrays& inputs, mx::Stream s) {
  if (s.device != mx::Device::gpu) return;
  auto type = mx::promote_types(inputs[0].dtype(), inputs[1].dtype());
  for (int i : {0, 1}) inputs[i] = mx::astype(inputs[i], type, s);
}

/**
 * Rows that a GPU encodes as one node. All chunks of a node's product live until the GPU has done with them, since
 * MLX's product allocates its output; more rows become several nodes, between which MLX waits for memory.
 */
inline int rows_at_once(const Arrays& inputs, mx::Stream s) {
  if (s.device != mx::Device::gpu) return INT32_MAX;
  constexpr int64_t bytes = int64_t{1} << 29;
  int64_t row = std::max<int64_t>(1, inputs[1].shape(0)) * static_cast<int64_t>(inputs[1].itemsize());
  return static_cast<int>(std::clamp<int64_t>(bytes / row / 256 * 256, 256, INT32_MAX));
}

/** How an encoder multiplies. */
struct Product {
  bool certified = false, tf32 = false;
  bool operator==(const Product&) const = default;
};

/** The choice that an op was given. */
inline Product check_product(const char* op, const std::optional<Shadow>& shadow, bool tf32) {
  if (shadow && tf32) fail(op, "shadow and tf32 must not both be given but are.");
  return {shadow.has_value(), tf32};
}

/** The sizes of an encoder's plan. float32 operands give the float32 result, but for tf32; others that of the product
 * in their type. */
inline gpu::EncodeSizes encode_sizes(const Arrays& in, Product product) {
  bool shadow = product.certified;
  return {in[0].shape(0),
          in[0].shape(1),
          in[1].shape(0),
          gpu_type(in[1]),
          in[1].dtype() == mx::float32 && !product.tf32,
          shadow,
          aligned_rows(in[0]) && aligned_rows(in[1]),
          in[2].offset() % gpu::kVectorBytes == 0 && (!shadow || in.back().offset() % gpu::kVectorBytes == 0)};
}

/** Integers in the order of selection: larger values first (NaN first of all), of equal values the lower place. */
inline mx::array descending_key(const mx::array& values, mx::Stream s) {
  auto v = mx::add(mx::stop_gradient(values, s), mx::array(0.0f), s);  // -0 becomes +0
  auto bits = mx::view(v, mx::int32, s);
  auto flip = mx::bitwise_and(mx::right_shift(bits, mx::array(31), s), mx::array(0x7fffffff), s);
  auto key = mx::where(mx::isnan(v, s), mx::array(0x7fffffff), mx::bitwise_xor(bits, flip, s), s);
  auto high = mx::left_shift(mx::astype(mx::bitwise_invert(key, s), mx::int64, s), mx::array(32, mx::int64), s);
  auto low = mx::broadcast_to(mx::arange(0, v.shape(1), mx::int64, s), v.shape(), s);
  return mx::add(high, low, s);  // not bitwise_or: under vmap MLX reads an operand that is not batched past its end
}

/** The k best of values [n, m] at places [n, m], back in ascending order of place. */
inline void keep_best(mx::array& values, mx::array& places, int k, mx::Stream s) {
  if (values.shape(1) <= k) return;
  auto order = mx::slice(mx::argsort(descending_key(values, s), 1, s), {0, 0}, {values.shape(0), k}, s);
  order = mx::sort(order, 1, s);
  values = mx::take_along_axis(values, order, 1, s);
  places = mx::take_along_axis(places, order, 1, s);
}

/** Ones [n, 1], in the shape of a sum of x's rows: unlike a constant's it follows mx.compile(shapeless=True). */
inline mx::array ones_column(const mx::array& x, mx::Stream s) { return mx::ones_like(mx::sum(x, 1, true, s), s); }

/** A cotangent where the value is positive (or NaN), else 0. */
inline mx::array gate(const mx::array& values, const mx::array& ct, mx::Stream s) {
  return mx::where(mx::less_equal(values, mx::array(0, values.dtype()), s), mx::zeros_like(ct, s), ct, s);
}

}  // namespace mlxsae
