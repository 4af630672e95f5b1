#pragma once
// What a GPU room offers to the ops: csrc/metal in a build for macOS, csrc/cuda for Linux, csrc/no_gpu elsewhere.

#include "gpu/device.h"
#include "gpu/plan.h"
#include "mlx/array.h"

namespace mlxsae::gpu {

struct Support {
  bool kernel;
  std::string text;  // of a kernel: the room's name; else why there is none, empty where there is nothing to say
};

/** Whether a kernel of this build runs `op` on this machine's GPU. The answer of the first call stays. */
const Support& support(const std::string& op);

/** The row of this machine's GPU. */
const Device& device();

/** Allocates the outputs and puts the plan's steps on the stream. */
void run(const Plan& plan, const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs,
         mlx::core::Stream s);

}  // namespace mlxsae::gpu
