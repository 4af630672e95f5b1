#pragma once

#include "gpu/code.h"
#include "gpu/device.h"

namespace mlxsae::gpu {

/** Inputs values, indices, w [d_sae, d][, bias [d]][, offsets]; output [n, d]. aligned: of w, bias and the output. */
Plan sparse_decode(const CodeSize& code, int64_t d, int64_t d_sae, Type w, std::optional<Type> bias, bool aligned);

/** Inputs values, indices, w, target [n, d][, bias][, offsets], all float32; outputs residual [n, d], square [n]. */
Plan decode_residual(const CodeSize& code, int64_t d, int64_t d_sae, bool bias, bool aligned);

}  // namespace mlxsae::gpu
