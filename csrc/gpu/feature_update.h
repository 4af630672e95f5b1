#pragma once

#include "gpu/code.h"

namespace mlxsae::gpu {

struct FeatureUpdateSize {
  int64_t n, d_in, d_out, d_sae;
  std::vector<CodeSize> terms;  // the main one, then the auxiliary ones
  bool shadow;
  bool aligned;  // x, residuals, parameters and moments
  Type moments;  // of w_enc and w_dec, float32 or bfloat16
};

struct FeatureUpdateOptions {
  float beta1, beta2, eps;
  float step_size;      // lr / (1 - beta1^t)
  float inv_sqrt_bias;  // 1 / sqrt(1 - beta2^t)
  bool project, normalize, through_input;
  bool keep_encoder, keep_decoder;  // rows of features without entries stay what they are
  float clip_norm;                  // 0: none
  uint32_t seed;                    // of the noise that rounds moments to bfloat16: the step
};

/** Inputs and outputs as those of the primitive (csrc/ops/feature_update.h). */
Plan feature_update(const FeatureUpdateSize& size, const FeatureUpdateOptions& options);

}  // namespace mlxsae::gpu
