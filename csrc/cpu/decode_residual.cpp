#include "ops/decode_residual.h"

#include "cpu/dense.h"

namespace mlxsae {

void DecodeResidual::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  cpu::dispatch(stream(), inputs, outputs,
                [code = cpu::code_of(&inputs[0], inputs[1], csr_ ? &inputs.back() : nullptr),
                 w = inputs[2].data<float>(), d_sae = int64_t{inputs[2].shape(0)}, d = int64_t{inputs[2].shape(1)},
                 target = inputs[3].data<float>(), bias = inputs.size() > 4u + csr_ ? inputs[4].data<float>() : nullptr,
                 residual = outputs[0].data<float>(), square = outputs[1].data<float>()] {
                  cpu::check_code("decode_residual", code, d_sae);
                  if (cpu::dense_residual(code, w, bias, target, d_sae, d, residual, square)) return;
                  cpu::parallel_ranges(code.n, 8, [&](int64_t t0, int64_t t1) {
                    cpu::kernels().residual(code, w, bias, target, d, residual, square, t0, t1);
                  });
                });
}

}  // namespace mlxsae
