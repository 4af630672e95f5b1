#include "ops/topk_encode.h"

namespace mlxsae {
namespace {

/** Integers in the order of selection: larger values first (NaN first of all), of equal values the lower place. */
mx::array descending_key(const mx::array& values, mx::Stream s) {
  auto v = mx::add(mx::stop_gradient(values, s), mx::array(0.0f), s);  // -0 becomes +0
  auto bits = mx::view(v, mx::int32, s);
  auto flip = mx::bitwise_and(mx::right_shift(bits, mx::array(31), s), mx::array(0x7fffffff), s);
  auto key = mx::where(mx::isnan(v, s), mx::array(0x7fffffff), mx::bitwise_xor(bits, flip, s), s);
  auto high = mx::left_shift(mx::astype(mx::bitwise_invert(key, s), mx::int64, s), mx::array(32, mx::int64), s);
  auto low = mx::broadcast_to(mx::arange(0, v.shape(1), mx::int64, s), v.shape(), s);
  return mx::bitwise_or(high, low, s);
}

/**
 * The definition in plain MLX ops. Features are taken in chunks, so that no [n, d_sae] array exists here either.
 */
Arrays graph(const Arrays& in, int k, mx::Stream s) {
  const auto &x = in[0], &w = in[1];
  auto out_type = mx::promote_types(x.dtype(), w.dtype());
  auto x32 = mx::astype(x, mx::float32, s);
  int n = x.shape(0), d_sae = w.shape(0), chunk = std::max(1024, 2 * k);
  std::optional<mx::array> best, places;
  for (int f = 0; f < d_sae; f += chunk) {
    int end = std::min(d_sae, f + chunk);
    auto rows = mx::astype(mx::slice(w, {f, 0}, {end, w.shape(1)}, s), mx::float32, s);
    auto pre = mx::matmul(x32, mx::transpose(rows, s), s);
    if (in.size() > 2) pre = mx::add(pre, mx::astype(mx::slice(in[2], {f}, {end}, s), mx::float32, s), s);
    auto here = mx::broadcast_to(mx::arange(f, end, mx::uint32, s), {n, end - f}, s);
    auto values = best ? mx::concatenate({*best, pre}, 1, s) : pre;
    auto ids = places ? mx::concatenate({*places, here}, 1, s) : here;
    if (values.shape(1) > k) {
      auto order = mx::slice(mx::argsort(descending_key(values, s), 1, s), {0, 0}, {n, k}, s);
      order = mx::sort(order, 1, s);  // back to ascending features
      values = mx::take_along_axis(values, order, 1, s);
      ids = mx::take_along_axis(ids, order, 1, s);
    }
    best = values;
    places = ids;
  }
  auto zero = mx::array(0.0f);
  auto relu = mx::where(mx::less_equal(*best, zero, s), mx::zeros_like(*best, s), *best, s);
  return {mx::astype(relu, out_type, s), *places};
}

mx::array gate(const mx::array& values, const mx::array& ct, mx::Stream s) {
  return mx::where(mx::less_equal(values, mx::array(0, values.dtype()), s), mx::zeros_like(ct, s), ct, s);
}

}  // namespace

std::pair<mx::array, mx::array> topk_encode(const mx::array& x, const mx::array& w_enc,
                                            const std::optional<mx::array>& b_enc, int k, mx::StreamOrDevice s_) {
  const char* op = "topk_encode";
  check_matrix(op, "x", x);
  check_matrix(op, "w_enc", w_enc);
  int d_sae = w_enc.shape(0);
  if (x.shape(1) != w_enc.shape(1))
    fail(op, "x [n, d_in] and w_enc [d_sae, d_in] must share d_in but got ", x.shape(), " and ", w_enc.shape(), ".");
  if (b_enc) check_vector(op, "b_enc", *b_enc, d_sae, "d_sae");
  if (k <= 0 || k > d_sae) fail(op, "k must be in (0, d_sae] but got k=", k, " with d_sae=", d_sae, ".");

  auto s = mx::to_stream(s_);
  auto define = [k, s](const Arrays& in) { return graph(in, k, s); };
  Arrays inputs{x, w_enc};
  if (b_enc) inputs.push_back(*b_enc);
  if (!has_kernel(op, s.device)) {
    auto out = define(inputs);
    return {out[0], mx::stop_gradient(out[1], s)};
  }
  for (auto& a : inputs) a = normal(a, s);
  if (b_enc) inputs[2] = mx::astype(inputs[2], mx::float32, s);
  mx::Shape shape{x.shape(0), k};
  auto out = mx::array::make_arrays({shape, shape}, {mx::promote_types(x.dtype(), w_enc.dtype()), mx::uint32},
                                    std::make_shared<TopKEncode>(s, define, k), inputs);
  return {out[0], mx::stop_gradient(out[1], s)};  // places have no derivative, and gathers insist on being told
}

Arrays TopKEncode::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                       const Arrays& outputs) {
  auto s = stream();
  const auto &x = primals[0], &w = primals[1], &indices = outputs[1];
  auto d_pre = gate(outputs[0], cotangents[0], s);
  Arrays grads;
  for (int a : argnums) {
    if (a == 0)
      grads.push_back(mx::astype(sparse_decode(d_pre, indices, w, std::nullopt, s), x.dtype(), s));
    else if (a == 1)
      grads.push_back(mx::astype(sparse_outer(d_pre, indices, x, w.shape(0), s), w.dtype(), s));
    else
      grads.push_back(mx::astype(
          mx::squeeze(sparse_outer(mx::astype(d_pre, mx::float32, s), indices, mx::ones({x.shape(0), 1}, mx::float32, s),
                                   w.shape(0), s),
                      1, s),
          primals[2].dtype(), s));
  }
  return grads;
}

Arrays TopKEncode::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  std::optional<mx::array> bias;
  if (primals.size() > 2) bias = primals[2];
  auto [values, indices] = topk_encode(primals[0], primals[1], bias, k_, s);
  Arrays terms;
  for (size_t i = 0; i < argnums.size(); ++i) {
    const auto& t = tangents[i];
    if (argnums[i] == 0) terms.push_back(gather_dot(t, primals[1], indices, s));
    if (argnums[i] == 1) terms.push_back(gather_dot(primals[0], t, indices, s));
    if (argnums[i] == 2) terms.push_back(mx::take(t, indices, s));
  }
  auto d_values = mx::astype(gate(values, add_all(terms, s), s), values.dtype(), s);
  return {d_values, mx::zeros_like(indices, s)};
}

std::pair<Arrays, std::vector<int>> TopKEncode::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  bool only_x = axes[0] >= 0;
  for (size_t i = 1; i < axes.size(); ++i) only_x &= axes[i] < 0;
  if (!only_x) return FusedPrimitive::vmap(inputs, axes);
  auto s = stream();  // more rows of the same problem
  auto x = mx::moveaxis(inputs[0], axes[0], 0, s);
  std::optional<mx::array> bias;
  if (inputs.size() > 2) bias = inputs[2];
  auto [values, indices] = topk_encode(mx::flatten(x, 0, 1, s), inputs[1], bias, k_, s);
  mx::Shape shape{x.shape(0), x.shape(1), k_};
  return {{mx::reshape(values, shape, s), mx::reshape(indices, shape, s)}, {0, 0}};
}

}  // namespace mlxsae
