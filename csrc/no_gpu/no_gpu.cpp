#include "no_gpu/no_gpu.h"

namespace mlxsae::gpu {

bool has_kernel(const char*) { return false; }

}  // namespace mlxsae::gpu
