#include "ops/topk_encode.h"

#include "gpu/topk_encode.h"
#include "ops/encoder_shadow.h"
#include "ops/selection.h"

namespace mlxsae {
namespace {

/**
 * The definition in plain MLX ops. Features are taken in chunks, so that no [n, d_sae] array exists here either.
 */
Arrays topk_encode_graph(const Arrays& in, int k, int k_aux, mx::Stream s) {
  const auto &x = in[0], &w = in[1];
  auto out_type = mx::promote_types(x.dtype(), w.dtype());
  auto x32 = mx::astype(x, mx::float32, s);
  int n = x.shape(0), d_sae = w.shape(0), chunk = std::max(1024, 2 * std::max(k, k_aux));
  auto lowest = mx::array(-std::numeric_limits<float>::infinity());
  std::vector<std::pair<mx::array, mx::array>> best;  // values, places; of all features, of the masked ones
  for (int f = 0; f < d_sae; f += chunk) {
    int end = std::min(d_sae, f + chunk);
    auto rows = mx::astype(mx::slice(w, {f, 0}, {end, w.shape(1)}, s), mx::float32, s);
    auto pre = mx::matmul(x32, mx::transpose(rows, s), s);
    pre = mx::add(pre, mx::astype(mx::slice(in[2], {f}, {end}, s), mx::float32, s), s);
    auto here = mx::broadcast_to(mx::arange(f, end, mx::uint32, s), {n, end - f}, s);
    for (int q = 0; q < (k_aux ? 2 : 1); ++q) {
      auto values = q ? mx::where(mx::slice(in[3], {f}, {end}, s), pre, lowest, s) : pre;
      if (f == 0)
        best.emplace_back(values, here);
      else
        best[q] = {mx::concatenate({best[q].first, values}, 1, s), mx::concatenate({best[q].second, here}, 1, s)};
      keep_best(best[q].first, best[q].second, q ? k_aux : k, s);
    }
  }
  Arrays out;
  for (auto& [values, places] : best) {
    auto relu = mx::where(mx::less_equal(values, mx::array(0.0f), s), mx::zeros_like(values, s), values, s);
    out.push_back(mx::astype(relu, out_type, s));
    out.push_back(places);
  }
  return out;
}

Arrays encode(const char* op, const mx::array& x, const mx::array& w_enc, const std::optional<mx::array>& b_enc, int k,
              const std::optional<mx::array>& mask, int k_aux, const std::optional<Shadow>& shadow, bool tf32,
              mx::Stream s) {
  int d_sae = check_encoder(op, x, w_enc, b_enc);
  if (k <= 0 || k > d_sae) fail(op, "k must be in (0, d_sae] but got k=", k, " with d_sae=", d_sae, ".");
  if (mask) {
    if (mask->dtype() != mx::bool_ || mask->ndim() != 1 || mask->shape(0) != d_sae)
      fail(op, "mask must be bool of shape [d_sae] = [", d_sae, "] but got ", mask->dtype(), " ", mask->shape(), ".");
    if (k_aux <= 0 || k_aux > d_sae)
      fail(op, "k_aux must be in (0, d_sae] but got k_aux=", k_aux, " with d_sae=", d_sae, ".");
  }
  auto product = check_product(op, shadow, tf32);
  if (shadow) check_shadow(op, *shadow, w_enc, s.device);
  auto define = [k, k_aux, s](const Arrays& in) { return topk_encode_graph(in, k, k_aux, s); };
  Arrays inputs{x, w_enc, bias_or_zeros(b_enc, d_sae, s)};
  if (mask) inputs.push_back(*mask);
  Arrays out;
  if (has_kernel("topk_encode", s.device)) {
    one_type_on_gpu(inputs, s);
    if (int rows = rows_at_once(inputs, s); x.shape(0) > rows) {
      std::vector<Arrays> blocks;  // by output
      for (int t = 0; t < x.shape(0); t += rows) {
        auto block = mx::slice(inputs[0], {t, 0}, {std::min(x.shape(0), t + rows), x.shape(1)}, s);
        auto part = encode(op, block, inputs[1], inputs[2], k, mask, k_aux, shadow, tf32, s);
        blocks.resize(part.size());
        for (size_t q = 0; q < part.size(); ++q) blocks[q].push_back(part[q]);
      }
      for (auto& b : blocks) out.push_back(mx::concatenate(b, 0, s));
      return out;
    }
    if (shadow) {
      inputs[0] = mx::astype(x, mx::float32, s);
      inputs.insert(inputs.end(), {mx::stop_gradient(shadow->w16, s), mx::stop_gradient(shadow->columns, s)});
    }
    for (auto& a : inputs) a = normal(a, s);
    auto primitive = std::make_shared<TopKEncode>(s, define, k, k_aux, product);
    auto type = mx::promote_types(x.dtype(), w_enc.dtype());
    std::vector<mx::Dtype> types{type, mx::uint32};
    if (mask) types.insert(types.end(), {type, mx::uint32});
    out = mx::array::make_arrays(primitive->output_shapes(inputs), types, primitive, inputs);
  } else {
    out = define(inputs);
  }
  // Places have no derivative, and gathers insist on being told.
  for (size_t i = 1; i < out.size(); i += 2) out[i] = mx::stop_gradient(out[i], s);
  return out;
}

}  // namespace

std::pair<mx::array, mx::array> topk_encode(const mx::array& x, const mx::array& w_enc,
                                            const std::optional<mx::array>& b_enc, int k,
                                            const std::optional<Shadow>& shadow, bool tf32, mx::StreamOrDevice s) {
  auto out = encode("topk_encode", x, w_enc, b_enc, k, std::nullopt, 0, shadow, tf32, mx::to_stream(s));
  return {out[0], out[1]};
}

std::vector<mx::array> topk_encode_masked(const mx::array& x, const mx::array& w_enc,
                                          const std::optional<mx::array>& b_enc, const mx::array& mask, int k,
                                          int k_aux, const std::optional<Shadow>& shadow, bool tf32,
                                          mx::StreamOrDevice s) {
  return encode("topk_encode_masked", x, w_enc, b_enc, k, mask, k_aux, shadow, tf32, mx::to_stream(s));
}

gpu::Plan TopKEncode::plan(const Arrays& in, const gpu::Device& device) {
  return gpu::topk_encode({encode_sizes(in, product_), k_, k_aux_}, device);
}

Arrays TopKEncode::again(const mx::array& x, const Arrays& inputs) {
  std::optional<mx::array> mask;
  std::optional<Shadow> shadow;
  if (k_aux_) mask = inputs[3];
  if (product_.certified) shadow = Shadow{inputs[inputs.size() - 2], inputs[inputs.size() - 1]};
  return encode("topk_encode", x, inputs[1], inputs[2], k_, mask, k_aux_, shadow, product_.tf32, stream());
}

Arrays TopKEncode::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                       const Arrays& outputs) {
  auto s = stream();
  const auto &x = primals[0], &w = primals[1];
  auto ones = ones_column(x, s);
  Arrays grads;
  for (int a : argnums) {
    Arrays terms;  // one for each selection
    for (size_t q = 0; q < outputs.size(); q += 2) {
      auto d_pre = gate(outputs[q], cotangents[q], s);
      const auto& indices = outputs[q + 1];
      if (a == 0) terms.push_back(sparse_decode(d_pre, indices, w, std::nullopt, std::nullopt, s));
      if (a == 1) terms.push_back(sparse_outer(d_pre, indices, x, w.shape(0), std::nullopt, s));
      if (a == 2)
        terms.push_back(mx::squeeze(
            sparse_outer(mx::astype(d_pre, mx::float32, s), indices, ones, w.shape(0), std::nullopt, s), 1, s));
    }
    grads.push_back(a > 2 ? mx::zeros_like(primals[a], s) : mx::astype(add_all(terms, s), primals[a].dtype(), s));
  }
  return grads;
}

Arrays TopKEncode::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  auto out = again(primals[0], primals);
  Arrays result;
  for (size_t q = 0; q < out.size(); q += 2) {
    const auto &values = out[q], &indices = out[q + 1];
    Arrays terms{mx::zeros_like(values, s)};
    for (size_t i = 0; i < argnums.size(); ++i) {
      const auto& t = tangents[i];
      if (argnums[i] == 0) terms.push_back(gather_dot(t, primals[1], indices, std::nullopt, s));
      if (argnums[i] == 1) terms.push_back(gather_dot(primals[0], t, indices, std::nullopt, s));
      if (argnums[i] == 2) terms.push_back(mx::take(t, indices, s));
    }
    result.push_back(mx::astype(gate(values, add_all(terms, s), s), values.dtype(), s));
    result.push_back(mx::zeros_like(indices, s));
  }
  return result;
}

std::pair<Arrays, std::vector<int>> TopKEncode::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  bool only_x = axes[0] >= 0;
  for (size_t i = 1; i < axes.size(); ++i) only_x &= axes[i] < 0;
  if (!only_x) return FusedPrimitive::vmap(inputs, axes);
  auto s = stream();  // more rows of the same problem
  auto x = mx::moveaxis(inputs[0], axes[0], 0, s);
  auto out = again(mx::flatten(x, 0, 1, s), inputs);
  for (auto& a : out) a = mx::unflatten(a, 0, {x.shape(0), x.shape(1)}, s);
  return {out, std::vector<int>(out.size(), 0)};
}

}  // namespace mlxsae
