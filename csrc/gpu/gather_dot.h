#pragma once

#include "gpu/code.h"

namespace mlxsae::gpu {

/** Inputs rows [n, d], w [d_sae, d], indices[, offsets]; output as the indices. aligned: of rows and w. */
Plan gather_dot(const CodeSize& code, int64_t d, int64_t d_sae, Type rows, Type w, bool aligned);

}  // namespace mlxsae::gpu
