// A GPU that refuses the kernels of an op when it is first evaluated: the result is that of the op's definition, and
// kernel_for says why. Where there is no GPU, every op's eval_gpu meets such a refusal.
#include <cstdio>
#include <string>

#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlxsae/ops.h"

namespace mx = mlx::core;

/** What eval_gpu gives for the node behind `result` and its siblings, against what eval gives. */
static bool same(const std::string& op, const mx::array& result, double tolerance = 1e-4) {
  auto nodes = result.outputs();
  std::vector<mx::array> outputs;
  for (auto& a : nodes) outputs.emplace_back(a.shape(), a.dtype(), nullptr, std::vector<mx::array>{});
  auto inputs = result.inputs();
  mx::eval(inputs);
  result.primitive().eval_gpu(inputs, outputs);
  mx::synchronize();
  mx::eval(nodes);
  bool equal = true;
  for (size_t i = 0; i < nodes.size(); ++i) {
    outputs[i].set_status(mx::array::Status::available);
    equal &= mx::allclose(nodes[i], outputs[i], tolerance, 1e-5, true).item<bool>();
  }
  auto runs = mlxsae::kernel_for(op, mx::Device::gpu);
  std::printf("%s %s %s\n", op.c_str(), equal ? "same" : "DIFFERENT", runs.c_str());
  return equal && runs.starts_with("fallback (");
}

int main() {
  if (mx::is_available(mx::Device::gpu)) return 77;
  auto x = mx::random::normal({40, 16}), w = mx::random::normal({300, 16}), b = mx::random::normal({300});
  auto w16 = mlxsae::encoder_shadow(w, mx::bfloat16);
  auto mask = mx::greater(b, mx::array(0.0f));
  bool good = mlxsae::kernel_for("topk_encode", mx::Device::gpu) == "fallback";
  good &= same("encoder_shadow", w16.first, 0.01);  // its bounds need not be the tightest
  good &= same("topk_encode", mlxsae::topk_encode_masked(x, w, b, mask, 5, 7)[0]);
  auto [code, threshold] = mlxsae::batch_topk_encode(x, w, b, 5);
  good &= same("tokens_since_fired",
               mlxsae::tokens_since_fired(mx::zeros({300}, mx::int32), code.values, code.indices, 40, code.offsets));
  auto [values, indices] = mlxsae::topk_encode(x, w, b, 5);
  good &= same("sparse_decode", mlxsae::sparse_decode(values, indices, w));
  good &= same("decode_residual", mlxsae::decode_residual(values, indices, w, x).first);
  good &= same("gather_dot", mlxsae::gather_dot(x, w, indices));
  good &= same("sparse_outer", mlxsae::sparse_outer(values, indices, x, 300));
  auto [residual, square] = mlxsae::decode_residual(values, indices, w, x);
  std::vector<mx::array> params{w, b, w, mx::zeros({16})}, m, v;
  for (auto& p : params) {
    m.push_back(mx::zeros_like(p));
    v.push_back(mx::zeros_like(p));
  }
  good &=
      same("feature_update", mlxsae::feature_update(x, mx::sum(square), {{residual, values, indices, mx::array(0.1f)}},
                                                    params, m, v, {1e-3f})[0]);
  good &= same("adam_catch_up", mlxsae::adam_catch_up(w, m[0], v[0], mx::zeros({300}, mx::int32), mask,
                                                      {{1e-3f, 1e-3f}, 0.9f, 0.999f, 1e-8f, 2})[0]);
  return good ? 0 : 1;
}
