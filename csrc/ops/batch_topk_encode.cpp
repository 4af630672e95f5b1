#include "ops/batch_topk_encode.h"

#include "gpu/csr_encode.h"
#include "ops/encoder_shadow.h"
#include "ops/selection.h"

namespace mlxsae {
namespace {

/**
 * The definition in plain MLX ops. Rows are taken in chunks; the best so far stay in order of (row, feature), so that
 * among equal values the lowest place is the earliest.
 */
Arrays batch_topk_encode_graph(const Arrays& in, int k, mx::Stream s) {
  int n = in[0].shape(0), d_sae = in[1].shape(0), total = k * n;
  auto type = mx::promote_types(in[0].dtype(), in[1].dtype());
  if (n == 0)
    return {mx::zeros({0}, type, s), mx::zeros({0}, mx::uint32, s), mx::zeros({1}, mx::int64, s),
            mx::zeros({}, mx::float32, s)};
  std::optional<std::pair<mx::array, mx::array>> best;  // values [1, m] and places row * d_sae + feature
  for (auto [begin, end] : row_chunks(n, d_sae)) {
    auto pre = mx::reshape(pre_acts(in, begin, end, s), {1, -1}, s);
    auto values = mx::where(mx::less_equal(pre, mx::array(0.0f), s), mx::array(0.0f), pre, s);
    auto places = mx::add(mx::arange(0, values.shape(1), mx::int64, s),
                          mx::array(static_cast<int64_t>(begin) * d_sae, mx::int64), s);
    places = mx::expand_dims(places, 0, s);
    if (best)
      best = {mx::concatenate({best->first, values}, 1, s), mx::concatenate({best->second, places}, 1, s)};
    else
      best.emplace(values, places);
    keep_best(best->first, best->second, total, s);
  }
  auto values = mx::squeeze(best->first, 0, s), places = mx::squeeze(best->second, 0, s);
  auto used = mx::logical_not(mx::less_equal(mx::stop_gradient(values, s), mx::array(0.0f), s), s);
  auto here = mx::arange(0, total, mx::int64, s);
  auto order = mx::argsort(mx::where(used, here, mx::add(here, mx::array(int64_t{total}, mx::int64), s), s), 0, s);
  values = mx::take(values, order, 0, s);
  places = mx::take(places, order, 0, s);
  used = mx::take(used, order, 0, s);
  auto width = mx::array(int64_t{d_sae}, mx::int64);
  auto row = mx::where(used, mx::floor_divide(places, width, s), mx::array(int64_t{n}, mx::int64), s);
  auto feature = mx::where(used, mx::remainder(places, width, s), mx::array(int64_t{0}, mx::int64), s);
  auto counts = mx::scatter_add(mx::zeros({n + 1}, mx::int32, s), mx::astype(row, mx::int32, s),
                                mx::ones({total, 1}, mx::int32, s), 0, s);
  // The smallest value by its bits, among which NaN is the largest.
  constexpr int32_t nan_bits = 0x7fffffff;
  auto bits =
      mx::where(mx::isnan(values, s), mx::array(nan_bits), mx::view(mx::stop_gradient(values, s), mx::int32, s), s);
  auto least = mx::view(mx::min(mx::where(used, bits, mx::array(nan_bits), s), s), mx::float32, s);
  return {mx::astype(values, type, s), mx::astype(feature, mx::uint32, s),
          offsets_from(mx::slice(counts, {0}, {n}, s), s), mx::where(mx::any(used, s), least, mx::array(0.0f), s)};
}

Arrays encode(const mx::array& x, const mx::array& w_enc, const std::optional<mx::array>& b_enc, int k,
              const std::optional<mx::array>& hint, const std::optional<Shadow>& shadow, bool tf32, mx::Stream s) {
  const char* op = "batch_topk_encode";
  int d_sae = check_encoder(op, x, w_enc, b_enc);
  if (k <= 0 || k > d_sae) fail(op, "k must be in (0, d_sae] but got k=", k, " with d_sae=", d_sae, ".");
  if (static_cast<int64_t>(k) * x.shape(0) > INT32_MAX)
    fail(op, "k * n must be below 2^31 but got k=", k, " and n=", x.shape(0), ".");
  if (hint && hint->size() != 1) fail(op, "hint must be one number but got shape ", hint->shape(), ".");
  auto product = check_product(op, shadow, tf32);
  if (shadow) check_shadow(op, *shadow, w_enc, s.device);
  auto define = [k, s](const Arrays& in) { return batch_topk_encode_graph(in, k, s); };
  auto guess = hint ? mx::reshape(mx::astype(mx::stop_gradient(*hint, s), mx::float32, s), {}, s) : mx::array(0.0f);
  Arrays inputs{x, w_enc, bias_or_zeros(b_enc, d_sae, s), guess};
  if (!has_kernel(op, s.device)) return only_values(define(inputs), s);
  one_type_on_gpu(inputs, s);
  if (shadow) {
    inputs[0] = mx::astype(x, mx::float32, s);
    inputs.insert(inputs.end(), {mx::stop_gradient(shadow->w16, s), mx::stop_gradient(shadow->columns, s)});
  }
  for (auto& a : inputs) a = normal(a, s);
  auto primitive = std::make_shared<BatchTopKEncode>(s, define, k, product);
  auto type = mx::promote_types(x.dtype(), w_enc.dtype());
  return only_values(mx::array::make_arrays(primitive->output_shapes(inputs),
                                            {type, mx::uint32, mx::int64, mx::float32}, primitive, inputs),
                     s);
}

}  // namespace

std::pair<CsrCode, mx::array> batch_topk_encode(const mx::array& x, const mx::array& w_enc,
                                                const std::optional<mx::array>& b_enc, int k,
                                                const std::optional<mx::array>& hint,
                                                const std::optional<Shadow>& shadow, bool tf32, mx::StreamOrDevice s) {
  auto out = encode(x, w_enc, b_enc, k, hint, shadow, tf32, mx::to_stream(s));
  return {{out[0], out[1], out[2]}, out[3]};
}

gpu::Plan BatchTopKEncode::plan(const Arrays& in, const gpu::Device& device) {
  return gpu::batch_topk_encode({encode_sizes(in, product_), k_}, device);
}

Arrays BatchTopKEncode::again(const Arrays& in) {
  std::optional<Shadow> shadow;
  if (product_.certified) shadow = Shadow{in[4], in[5]};
  return encode(in[0], in[1], in[2], k_, in[3], shadow, product_.tf32, stream());
}

}  // namespace mlxsae
