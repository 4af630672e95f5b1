#include "gpu/adam_catch_up.h"

#include <algorithm>

#include "gpu/code.h"

namespace mlxsae::gpu {

Plan adam_catch_up(const CatchUpSize& s, const CatchUpOptions& o) {
  Plan plan;
  int64_t size = s.d_sae * s.d;
  int w = plan.input("w", Type::f32, size), m = plan.input("m", s.moments, size), v = plan.input("v", s.moments, size);
  int last_step = plan.input("last_step", Type::i32, s.d_sae), rows = plan.input("rows", Type::boolean, s.d_sae);
  int corrections = plan.input("corrections", Type::f32, 2 * s.steps);
  int w_out = plan.output("w", Type::f32, size, w), m_out = plan.output("m", s.moments, size, m);
  int v_out = plan.output("v", s.moments, size, v);
  int last_step_out = plan.output("last_step", Type::i32, s.d_sae, last_step);
  if (s.d_sae == 0) return plan;
  constexpr int64_t kMaxSimdgroups = 8;
  int64_t simdgroups = std::clamp<int64_t>(ceil_div(s.d, lanes(s.aligned) * kSimd), 1, kMaxSimdgroups);
  plan.launch("adam_catch_up", kernel_name("adam_catch_up", s.moments, s.aligned), {s.d_sae}, {kSimd * simdgroups})
      .read(0, w)
      .read(1, m)
      .read(2, v)
      .read(3, last_step)
      .read(4, rows)
      .read(5, corrections)
      .write(6, w_out)
      .write(7, m_out)
      .write(8, v_out)
      .write(9, last_step_out)
      .argument(10, o.beta1)
      .argument(11, o.beta2)
      .argument(12, o.eps)
      .argument(13, o.step)
      .argument(14, static_cast<uint32_t>(s.steps))
      .argument(15, static_cast<uint32_t>(s.d))
      .argument(16, static_cast<uint32_t>(o.normalize));
  return plan;
}

}  // namespace mlxsae::gpu
