#pragma once

#include "ops/common.h"

namespace mlxsae {

/** What the step number makes of the learning rate: lr / (1 - beta1^t), and 1 / sqrt(1 - beta2^t). */
struct BiasCorrection {
  float step_size, inv_sqrt_bias;
};
BiasCorrection bias_correction(float lr, float beta1, float beta2, int step);

/** The seed of the noise that rounds the moments of w_enc (parameter 0) and w_dec (parameter 2) to bfloat16. */
inline uint32_t noise_seed(int step, int parameter) {
  return 2 * static_cast<uint32_t>(step) + static_cast<uint32_t>(parameter / 2);
}

/** Throws std::invalid_argument unless the moments of matrices may have this type. */
void check_moments(const char* op, mx::Dtype moments);

struct AdamOptions {
  float beta1, beta2, eps;
  BiasCorrection correction;
  uint32_t seed;   // of the noise that rounds moments to bfloat16
  bool normalize;  // rows of the new weights have norm 1
};

/** w, m and v after one step, in plain MLX ops; m and v keep their type, in bfloat16 by stochastic rounding. */
Arrays adam_graph(const mx::array& w, const mx::array& m, const mx::array& v, const mx::array& g, const AdamOptions& o,
                  mx::Stream s);

/** Every output of a node holds its inputs, and would keep them from being donated. All outputs come into being in one
 * eval, so only the list that it reads is needed; MLX drops the others right after it anyway. */
inline void let_go(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs)
    if (&out.inputs() != &inputs) out.inputs().clear();
}

}  // namespace mlxsae
