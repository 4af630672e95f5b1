#include "ops/adam_catch_up.h"

#include <cmath>

#include "gpu/adam_catch_up.h"

namespace mlxsae {
namespace {

constexpr int kDecoder = 2;  // among the parameters, as in feature_update

/** The definition in plain MLX ops: every step for every row, kept where a row has missed it. */
Arrays adam_catch_up_graph(const Arrays& in, const CatchUpOptions& o, mx::Stream s) {
  auto w = in[0], m = in[1], v = in[2];
  const auto &last_step = in[3], &rows = in[4];
  int steps = static_cast<int>(o.lr.size());
  for (int i = 0; i < steps; ++i) {
    int t = o.step - steps + 1 + i;
    float lr = o.lr[i];
    if (t < 1 || std::isnan(lr)) continue;
    auto stepped = adam_graph(
        w, m, v, mx::array(0.0f),
        {o.beta1, o.beta2, o.eps, bias_correction(lr, o.beta1, o.beta2, t), noise_seed(t, kDecoder), o.normalize}, s);
    auto missed = mx::expand_dims(mx::logical_and(rows, mx::less(last_step, mx::array(t), s), s), 1, s);
    w = mx::where(missed, stepped[0], w, s);
    m = mx::where(missed, stepped[1], m, s);
    v = mx::where(missed, stepped[2], v, s);
  }
  return {w, m, v, mx::where(rows, mx::maximum(last_step, mx::array(o.step), s), last_step, s)};
}

}  // namespace

Arrays adam_catch_up(const mx::array& w, const mx::array& m, const mx::array& v, const mx::array& last_step,
                     const mx::array& rows, const CatchUpOptions& options, mx::StreamOrDevice s_) {
  const char* op = "adam_catch_up";
  auto s = mx::to_stream(s_);
  if (w.ndim() != 2 || w.dtype() != mx::float32)
    fail(op, "w must be float32 [d_sae, d] but got ", w.dtype(), " ", w.shape(), ".");
  for (auto* moment : {&m, &v})
    if (moment->shape() != w.shape() || moment->dtype() != m.dtype())
      fail(op, "m and v must have the shape of w ", w.shape(), " and one type but got ", moment->dtype(), " ",
           moment->shape(), ".");
  check_moments(op, m.dtype());
  if (last_step.shape() != mx::Shape{w.shape(0)} || last_step.dtype() != mx::int32)
    fail(op, "last_step must be int32 of shape [d_sae] = [", w.shape(0), "] but got ", last_step.dtype(), " ",
         last_step.shape(), ".");
  if (rows.shape() != last_step.shape() || rows.dtype() != mx::bool_)
    fail(op, "rows must be bool of shape [d_sae] = [", w.shape(0), "] but got ", rows.dtype(), " ", rows.shape(), ".");
  if (options.step < 1) fail(op, "step must be at least 1 but got ", options.step, ".");
  if (options.lr.empty()) fail(op, "lr must hold the rate of the last step but is empty.");
  auto define = [options, s](const Arrays& in) { return adam_catch_up_graph(in, options, s); };
  std::vector<float> corrections;
  int steps = static_cast<int>(options.lr.size());
  for (int i = 0; i < steps; ++i) {
    // Of steps before the first, which no row can have missed, nothing is asked.
    auto [size, inverse] =
        bias_correction(options.lr[i], options.beta1, options.beta2, std::max(options.step - steps + 1 + i, 1));
    corrections.insert(corrections.end(), {size, inverse});
  }
  Arrays inputs{w, m, v, last_step, rows, mx::array(corrections.data(), {steps, 2})};
  if (!has_kernel(op, s.device)) return define(inputs);
  for (auto& a : inputs) a = normal(a, s);
  auto primitive = std::make_shared<AdamCatchUp>(s, define, options);
  return mx::array::make_arrays(primitive->output_shapes(inputs), {w.dtype(), m.dtype(), v.dtype(), mx::int32},
                                primitive, inputs);
}

void AdamCatchUp::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  let_go(inputs, outputs);
  FusedPrimitive::eval_gpu(inputs, outputs);
}

gpu::Plan AdamCatchUp::plan(const Arrays& in, const gpu::Device&) {
  bool aligned = true;
  for (int i = 0; i < 3; ++i) aligned &= aligned_rows(in[i]);
  const auto& o = options_;
  return gpu::adam_catch_up(
      {in[0].shape(0), in[0].shape(1), static_cast<int64_t>(o.lr.size()), gpu_type(in[1]), aligned},
      {o.beta1, o.beta2, o.eps, o.step, o.normalize});
}

}  // namespace mlxsae
