#pragma once

#include "gpu/plan.h"

namespace mlxsae::gpu {

struct CatchUpSize {
  int64_t d_sae, d, steps;  // steps: how many corrections there are
  Type moments;             // float32 or bfloat16
  bool aligned;             // weights and moments
};

struct CatchUpOptions {
  float beta1, beta2, eps;
  int32_t step;
  bool normalize;
};

/** Inputs and outputs as those of the primitive (csrc/ops/adam_catch_up.h). */
Plan adam_catch_up(const CatchUpSize& size, const CatchUpOptions& options);

}  // namespace mlxsae::gpu
