#include "ops/sparse_outer.h"

#include "cpu/eval.h"

namespace mlxsae {

void SparseOuter::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  auto& out = outputs[0];
  cpu::allocate(out);
  cpu::dispatch(
      stream(), inputs, outputs,
      [code = cpu::code_of(&inputs[0], inputs[1], csr_ ? &inputs.back() : nullptr), rows = cpu::rows_of(inputs[2]),
       d_sae = int64_t{d_sae_}, to = out.data<char>(), to_type = cpu::type_of(out)] {
        cpu::check_code("sparse_outer", code, d_sae);
        cpu::Grouped grouped(code, d_sae);
        auto cuts = grouped.ranges(8 * cpu::num_threads(), 0.5);
        auto by = grouped.view();
        cpu::parallel_for(static_cast<int64_t>(cuts.size()) - 1,
                          [&](int64_t i, int) { cpu::kernels().outer(by, rows, to, to_type, cuts[i], cuts[i + 1]); });
      });
}

}  // namespace mlxsae
