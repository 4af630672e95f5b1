#pragma once

#include "gpu/code.h"

namespace mlxsae::gpu {

/** Inputs values, indices, rows [n, d][, offsets]; output [d_sae, d]. aligned: of rows and the output. */
Plan sparse_outer(const CodeSize& code, int64_t d, int64_t d_sae, Type rows, bool aligned);

}  // namespace mlxsae::gpu
