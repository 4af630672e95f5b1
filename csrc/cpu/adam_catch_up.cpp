#include "ops/adam_catch_up.h"

#include <cstring>

#include "cpu/eval.h"

namespace mlxsae {

void AdamCatchUp::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  let_go(inputs, outputs);
  std::vector<cpu::InPlace> kept;
  for (size_t i = 0; i < outputs.size(); ++i) kept.emplace_back(inputs[i], outputs[i]);
  const auto& o = options_;
  cpu::CatchUp c{};
  c.w_dec = {outputs[0].data<float>(), outputs[1].data<void>(), outputs[2].data<void>(),
             outputs[1].dtype() == mx::float32 ? cpu::Type::f32 : cpu::Type::bf16, 0};
  c.last_step = outputs[3].data<int32_t>(), c.rows = inputs[4].data<bool>();
  c.corrections = inputs[5].data<float>(), c.n_corrections = inputs[5].shape(0);
  c.step = o.step, c.d_out = inputs[0].shape(1), c.normalize = o.normalize;
  c.adam = {o.beta1, o.beta2, o.eps, 0, 0};
  cpu::dispatch(stream(), inputs, outputs, [c, kept, d_sae = int64_t{inputs[0].shape(0)}] {
    for (auto& array : kept) array.begin();
    for (int64_t j = 0; j < d_sae; ++j)
      if (c.rows[j] && c.last_step[j] < c.step - c.n_corrections)
        throw std::out_of_range("[adam_catch_up] no row may have missed more steps than lr has rates, " +
                                std::to_string(c.n_corrections) + ", but row " + std::to_string(j) + " has made step " +
                                std::to_string(c.last_step[j]) + " of " + std::to_string(c.step) + ".");
    cpu::parallel_ranges(d_sae, 16, [&](int64_t f0, int64_t f1) {
      cpu::CatchUp part = c;
      part.f0 = f0, part.f1 = f1;
      cpu::kernels().catch_up(part);
    });
  });
}

}  // namespace mlxsae
