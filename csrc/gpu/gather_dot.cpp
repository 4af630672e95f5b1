#include "gpu/gather_dot.h"

#include <algorithm>

namespace mlxsae::gpu {

Plan gather_dot(const CodeSize& code, int64_t d, int64_t d_sae, Type rows, Type w, bool aligned) {
  constexpr int64_t slots = 4;  // kDots of metal/gather_dot.h: the slots of a simdgroup
  Plan plan;
  int left = plan.input("rows", rows, code.n * d), weights = plan.input("w", w, d_sae * d);
  int indices = plan.input("indices", Type::u32, code.room);
  int offsets = code.compressed ? plan.input("offsets", Type::i64, code.n + 1) : -1;
  Type type = promoted(rows, w);
  int out = plan.output("out", type, code.room);
  if (code.room == 0) return plan;
  plan.launch("gather_dot", kernel_name("gather_dot", w, aligned), {code.n + 1},
              {kSimd * std::clamp<int64_t>(ceil_div(code.mean(), slots), 1, 8)})
      .read(0, left)
      .read(1, weights)
      .read(2, indices)
      .read(3, offsets)
      .write(4, out)
      .argument(5, static_cast<uint32_t>(code.n))
      .argument(6, static_cast<uint32_t>(d))
      .argument(7, static_cast<uint32_t>(d_sae))
      .argument(8, code.slots())
      .argument(9, code.room)
      .argument(10, static_cast<uint32_t>(rows))
      .argument(11, static_cast<uint32_t>(type));
  return plan;
}

}  // namespace mlxsae::gpu
