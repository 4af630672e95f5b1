#include "ops/feature_update.h"

#include "gpu/feature_update.h"
#include "ops/encoder_shadow.h"

namespace mlxsae {
namespace {

/** The definition in plain MLX ops, with dense gradients. */
Arrays feature_update_graph(const Arrays& in, const std::vector<bool>& csr, const UpdateOptions& o, mx::Stream s) {
  const auto &x = in[0], &loss = in[1];
  size_t n_terms = csr.size();
  Arrays p(in.begin() + FeatureUpdate::place_of_offsets(csr, n_terms), in.end());
  const auto &w_enc = p[0], &w_dec = p[2];
  int d_sae = w_enc.shape(0);
  auto d_enc = mx::zeros_like(w_enc, s), d_dec = mx::zeros_like(w_dec, s),
       d_bias = mx::zeros({d_sae, 1}, mx::float32, s);
  auto ones = mx::ones({x.shape(0), 1}, mx::float32, s);
  auto touched = mx::zeros({d_sae}, mx::bool_, s);
  auto d_b_dec = mx::multiply(mx::sum(in[2], 0, false, s), in[5], s);
  for (size_t q = 0; q < n_terms; ++q) {
    std::optional<mx::array> offsets;
    if (csr[q]) offsets = in[FeatureUpdate::place_of_offsets(csr, q)];
    const auto &residual = in[2 + 4 * q], &values = in[3 + 4 * q], &indices = in[4 + 4 * q], &scale = in[5 + 4 * q];
    auto silent = tokens_since_fired(mx::zeros({d_sae}, mx::int32, s), values, indices, 1, offsets, s);
    touched = mx::logical_or(touched, mx::equal(silent, mx::array(0), s), s);
    auto used = mx::logical_not(mx::less_equal(values, mx::array(0.0f), s), s);
    auto v = mx::where(used, values, mx::array(0.0f), s);
    auto g = mx::multiply(residual, scale, s);
    auto dz = mx::where(used, gather_dot(g, w_dec, indices, offsets, s), mx::array(0.0f), s);
    d_dec = mx::add(d_dec, sparse_outer(v, indices, g, d_sae, offsets, s), s);
    d_enc = mx::add(d_enc, sparse_outer(dz, indices, x, d_sae, offsets, s), s);
    d_bias = mx::add(d_bias, sparse_outer(dz, indices, ones, d_sae, offsets, s), s);
  }
  if (o.b_dec_to_input) d_b_dec = mx::subtract(d_b_dec, mx::sum(mx::multiply(d_bias, w_enc, s), 0, false, s), s);
  if (o.project_decoder) {
    auto along = mx::sum(mx::multiply(d_dec, w_dec, s), 1, true, s);
    d_dec = mx::subtract(d_dec, mx::multiply(along, w_dec, s), s);
  }
  Arrays grads{d_enc, mx::squeeze(d_bias, 1, s), d_dec, d_b_dec};
  Arrays squares;
  for (auto& g : grads) squares.push_back(mx::sum(mx::square(g, s), s));
  auto norm = mx::sqrt(add_all(squares, s), s);
  auto factor =
      o.clip_norm > 0 ? mx::minimum(mx::array(1.0f), mx::divide(mx::array(o.clip_norm), norm, s), s) : mx::array(1.0f);
  auto ok = mx::isfinite(loss, s);
  Arrays w(4, x), m(4, x), v(4, x);
  for (int i = 0; i < 4; ++i) {
    auto g = mx::multiply(grads[i], factor, s);
    auto stepped = adam_graph(p[i], p[4 + i], p[8 + i], g,
                              {o.beta1, o.beta2, o.eps, bias_correction(o.lr, o.beta1, o.beta2, o.step),
                               noise_seed(o.step, i), i == 2 && o.normalize_decoder},
                              s);
    auto moves = ok;
    if (i < 3 && (o.untouched == Untouched::keep || (i == 2 && o.untouched == Untouched::keep_decoder)))
      moves = mx::logical_and(ok, i == 1 ? touched : mx::expand_dims(touched, 1, s), s);
    w[i] = mx::where(moves, stepped[0], p[i], s);
    m[i] = mx::where(moves, stepped[1], p[4 + i], s);
    v[i] = mx::where(moves, stepped[2], p[8 + i], s);
  }
  Arrays out(w);
  out.insert(out.end(), m.begin(), m.end());
  out.insert(out.end(), v.begin(), v.end());
  out.push_back(norm);
  if (p.size() > 12) {
    auto [w16, columns] = encoder_shadow(w[0], p[12].dtype(), s);
    out.insert(out.end(), {w16, columns});
  }
  return out;
}

}  // namespace

Arrays feature_update(const mx::array& x, const mx::array& loss, const std::vector<UpdateTerm>& terms,
                      const Arrays& params, const Arrays& m, const Arrays& v, const UpdateOptions& options,
                      const std::optional<Shadow>& shadow, mx::StreamOrDevice s_) {
  const char* op = "feature_update";
  auto s = mx::to_stream(s_);
  if (params.size() != 4 || m.size() != 4 || v.size() != 4)
    fail(op, "params, m and v must hold w_enc, b_enc, w_dec and b_dec but got ", params.size(), ", ", m.size(), " and ",
         v.size(), " arrays.");
  if (terms.empty()) fail(op, "terms must hold the main term but is empty.");
  if (options.step < 1) fail(op, "step must be at least 1 but got ", options.step, ".");
  if (!(options.clip_norm >= 0)) fail(op, "clip_norm must be at least 0 but got ", options.clip_norm, ".");
  if (loss.size() != 1) fail(op, "loss must be one number but got shape ", loss.shape(), ".");
  Arrays inputs{x, mx::astype(loss, mx::float32, s)};
  int n = x.ndim() == 2 ? x.shape(0) : -1, d_out = params[2].ndim() == 2 ? params[2].shape(1) : -1;
  std::vector<bool> csr;
  Arrays offsets;
  for (auto& t : terms) {
    auto code = check_code(op, &t.values, t.indices, t.offsets, s);
    if (t.residual.shape() != mx::Shape{n, d_out} || code.n != n)
      fail(op, "residual [n, d_out] and the code must fit x ", x.shape(), " and w_dec ", params[2].shape(), " but got ",
           t.residual.shape(), " and n=", code.n, ".");
    inputs.insert(inputs.end(), {t.residual, mx::astype(t.values, mx::float32, s), code.indices,
                                 mx::astype(t.scale, mx::float32, s)});
    if (t.scale.size() != 1) fail(op, "scale must be one number but got shape ", t.scale.shape(), ".");
    csr.push_back(code.offsets.has_value());
    if (code.offsets) offsets.push_back(*code.offsets);
  }
  inputs.insert(inputs.end(), offsets.begin(), offsets.end());
  int d_sae = params[0].ndim() == 2 ? params[0].shape(0) : -1;
  if (params[0].shape() != mx::Shape{d_sae, x.shape(-1)} || params[1].shape() != mx::Shape{d_sae} ||
      params[2].shape() != mx::Shape{d_sae, d_out} || params[3].shape() != mx::Shape{d_out} ||
      (options.b_dec_to_input && x.shape(1) != d_out))
    fail(op, "w_enc [d_sae, d_in], b_enc [d_sae], w_dec [d_sae, d_out], b_dec [d_out] must fit x ", x.shape(),
         " but got ", params[0].shape(), ", ", params[1].shape(), ", ", params[2].shape(), ", ", params[3].shape(),
         ".");
  std::vector<mx::Dtype> types;
  auto moments = m[0].dtype();
  check_moments(op, moments);
  size_t first = inputs.size();
  for (auto* group : {&params, &m, &v})
    for (size_t i = 0; i < 4; ++i) {
      const auto& a = (*group)[i];
      if (a.shape() != params[i].shape())
        fail(op, "moments must have the shapes of their parameters but got ", a.shape(), " for ", params[i].shape(),
             ".");
      types.push_back(group != &params && i % 2 == 0 ? moments : mx::float32);
      if (group != &params && a.dtype() != types.back())
        fail(op, "moments of ", i % 2 ? "biases" : "both matrices", " must be ", types.back(), " but got ", a.dtype(),
             ".");
      inputs.push_back(a);
    }
  for (size_t i = 0; i < first + 4; ++i) {
    size_t ends = 2 + 4 * terms.size();
    bool index = (i >= 2 && i < ends && (i - 2) % 4 == 2) || (i >= ends && i < first);
    if (!index && inputs[i].dtype() != mx::float32)
      fail(op, "x, residuals and parameters must be float32 but got ", inputs[i].dtype(), ".");
  }
  if (shadow) {
    check_shadow(op, *shadow, params[0], s.device);
    inputs.insert(inputs.end(), {shadow->w16, shadow->columns});
  }
  auto define = [csr, options, s](const Arrays& in) { return feature_update_graph(in, csr, options, s); };
  if (!has_kernel(op, s.device)) return define(inputs);
  for (auto& a : inputs) a = normal(a, s);
  auto primitive = std::make_shared<FeatureUpdate>(s, define, csr, options);
  auto shapes = primitive->output_shapes(inputs);
  types.push_back(mx::float32);  // grad_norm
  if (shadow) types.insert(types.end(), {shadow->w16.dtype(), mx::float32});
  return mx::array::make_arrays(shapes, types, primitive, inputs);
}

std::vector<mx::Shape> FeatureUpdate::output_shapes(const Arrays& in) {
  std::vector<mx::Shape> shapes;
  size_t first = place_of_offsets(csr_, csr_.size());
  for (size_t i = first; i < in.size(); ++i) shapes.push_back(in[i].shape());
  shapes.insert(shapes.begin() + 12, mx::Shape{});  // grad_norm
  return shapes;
}

void FeatureUpdate::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  let_go(inputs, outputs);
  FusedPrimitive::eval_gpu(inputs, outputs);
}

gpu::Plan FeatureUpdate::plan(const Arrays& in, const gpu::Device&) {
  size_t n_terms = csr_.size(), first = place_of_offsets(csr_, n_terms);
  const auto &x = in[0], &w_dec = in[first + 2];
  gpu::FeatureUpdateSize size{x.shape(0),
                              x.shape(1),
                              w_dec.shape(1),
                              w_dec.shape(0),
                              {},
                              in.size() > first + 12,
                              aligned_rows(x) && aligned_rows(w_dec),
                              gpu_type(in[first + 4])};
  for (size_t q = 0; q < n_terms; ++q) {
    const auto* offsets = csr_[q] ? &in[place_of_offsets(csr_, q)] : nullptr;
    size.terms.push_back(code_size(in[4 + 4 * q], offsets ? std::optional(*offsets) : std::nullopt));
    size.aligned &= aligned_rows(in[2 + 4 * q]);
  }
  for (size_t i = first; i < in.size(); ++i)
    if (in[i].ndim() == 2 && i != first + 13) size.aligned &= aligned_rows(in[i]);  // not the columns of the shadow
  const auto& o = options_;
  auto [step_size, inv_sqrt_bias] = bias_correction(o.lr, o.beta1, o.beta2, o.step);
  return gpu::feature_update(size, {o.beta1, o.beta2, o.eps, step_size, inv_sqrt_bias, o.project_decoder,
                                    o.normalize_decoder, o.b_dec_to_input, o.untouched == Untouched::keep,
                                    o.untouched != Untouched::step, o.clip_norm, static_cast<uint32_t>(o.step)});
}

}  // namespace mlxsae
