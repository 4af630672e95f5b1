#pragma once
// Arrays of a plan as MLX's, for the rooms that execute plans.

#include "gpu/plan.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlxsae::gpu {

/** Each buffer of a plan: inputs and outputs, donated ones in the memory of their donor, and temporaries. Outputs
 * and temporaries without memory have no data yet. */
std::vector<mlx::core::array> arrays_of(const Plan& plan, const std::vector<mlx::core::array>& inputs,
                                        std::vector<mlx::core::array>& outputs);

/** Whether an array of a plan has memory. */
inline bool has_memory(const mlx::core::array& a) { return a.data_shared_ptr() != nullptr; }

/** A step's product by MLX's own eval_gpu, which allocates it. */
mlx::core::array product(const Matmul& m, const mlx::core::array& a, const mlx::core::array& b, mlx::core::Stream s);

}  // namespace mlxsae::gpu
