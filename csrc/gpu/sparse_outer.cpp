#include "gpu/sparse_outer.h"

namespace mlxsae::gpu {

Plan sparse_outer(const CodeSize& code, int64_t d, int64_t d_sae, Type rows, bool aligned) {
  constexpr int64_t pieces = 4, simdgroups = 4;  // kOuterUnroll of metal/sparse_outer.h; items of a threadgroup
  Plan plan;
  CodeBuffers in{code, plan.input("values", code.type, code.room), plan.input("indices", Type::u32, code.room), -1};
  int right = plan.input("rows", rows, code.n * d);
  if (code.compressed) in.offsets = plan.input("offsets", Type::i64, code.n + 1);
  Type type = promoted(code.type, rows);
  int out = plan.output("out", type, d_sae * d);
  if (d == 0) return plan;
  Sorted by = sort_code(plan, {in}, d_sae, false);
  int64_t items = d_sae * ceil_div(d, pieces * kSimd * lanes(aligned));
  plan.launch("sparse_outer", kernel_name("sparse_outer", rows, aligned), {ceil_div(items, simdgroups)},
              {kSimd * simdgroups})
      .read(0, right)
      .read(1, by.starts)
      .read(2, by.rows)
      .read(3, by.values)
      .write(4, out)
      .argument(5, static_cast<uint32_t>(d))
      .argument(6, static_cast<uint32_t>(d_sae))
      .argument(7, static_cast<uint32_t>(type));
  return plan;
}

}  // namespace mlxsae::gpu
