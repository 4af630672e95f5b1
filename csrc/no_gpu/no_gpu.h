#pragma once

namespace mlxsae::gpu {

/** Whether this build has a GPU kernel for `op`. */
bool has_kernel(const char* op);

}  // namespace mlxsae::gpu
