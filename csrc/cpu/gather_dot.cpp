#include "ops/gather_dot.h"

#include <cstring>

#include "cpu/eval.h"

namespace mlxsae {

void GatherDot::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  auto& out = outputs[0];
  cpu::allocate(out);
  cpu::dispatch(stream(), inputs, outputs,
                [rows = cpu::rows_of(inputs[0]), w = cpu::rows_of(inputs[1]),
                 code = cpu::code_of(nullptr, inputs[2], csr_ ? &inputs.back() : nullptr), to = out.data<char>(),
                 to_type = cpu::type_of(out)] {
                  cpu::check_code("gather_dot", code, w.n);
                  size_t item = to_type == cpu::Type::f32 ? 4 : 2;  // entries of no row
                  std::memset(to + code.size() * item, 0, (code.room - code.size()) * item);
                  cpu::parallel_ranges(code.n, 8, [&](int64_t t0, int64_t t1) {
                    cpu::kernels().gather_dot(rows, w, code, to, to_type, t0, t1);
                  });
                });
}

}  // namespace mlxsae
