#pragma once

#include "gpu/code.h"

namespace mlxsae::gpu {

/** Inputs tokens_since_fired [d_sae], values, indices[, offsets]; output as the first, in whose memory it may lie. */
Plan tokens_since_fired(const CodeSize& code, int64_t d_sae, int32_t n_tokens);

}  // namespace mlxsae::gpu
