#pragma once

#include "gpu/code.h"

namespace mlxsae::gpu {

/** Input w [d_sae, d] float32; outputs w16 [d_sae, d] bfloat16 and columns [3, d_sae]. aligned: of w and w16. */
Plan encoder_shadow(int64_t d_sae, int64_t d, bool aligned);

}  // namespace mlxsae::gpu
