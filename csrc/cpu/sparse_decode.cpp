#include "ops/sparse_decode.h"

#include "cpu/eval.h"

namespace mlxsae {

void SparseDecode::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  auto& out = outputs[0];
  cpu::allocate(out);
  bool has_bias = inputs.size() > 3u + csr_;
  cpu::dispatch(stream(), inputs, outputs,
                [code = cpu::code_of(&inputs[0], inputs[1], csr_ ? &inputs.back() : nullptr),
                 w = cpu::rows_of(inputs[2]), bias = has_bias ? inputs[3].data<char>() : nullptr,
                 bias_type = has_bias ? cpu::type_of(inputs[3]) : cpu::Type::f32, to = out.data<char>(),
                 to_type = cpu::type_of(out)] {
                  cpu::check_code("sparse_decode", code, w.n);
                  cpu::parallel_ranges(code.n, 8, [&](int64_t t0, int64_t t1) {
                    cpu::kernels().decode(code, w, bias, bias_type, to, to_type, t0, t1);
                  });
                });
}

}  // namespace mlxsae
