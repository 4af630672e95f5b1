#include "gpu/encoder_shadow.h"

namespace mlxsae::gpu {

Plan encoder_shadow(int64_t d_sae, int64_t d, bool aligned) {
  constexpr int64_t rows = 8, simdgroups = 4;  // kShadowRows of metal/encoder_shadow.h, for each simdgroup
  Plan plan;
  int w = plan.input("w", Type::f32, d_sae * d);
  int w16 = plan.output("w16", Type::bf16, d_sae * d), columns = plan.output("columns", Type::f32, 3 * d_sae);
  if (d_sae == 0) return plan;
  plan.launch("encoder_shadow", kernel_name("encoder_shadow", std::nullopt, aligned),
              {ceil_div(d_sae, rows * simdgroups)}, {kSimd * simdgroups})
      .read(0, w)
      .write(1, w16)
      .write(2, columns)
      .argument(3, static_cast<uint32_t>(d))
      .argument(4, static_cast<uint32_t>(d_sae));
  return plan;
}

}  // namespace mlxsae::gpu
