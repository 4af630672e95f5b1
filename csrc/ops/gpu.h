#pragma once
// What a GPU room offers to the ops: csrc/metal in a build for macOS, csrc/cuda for Linux, csrc/no_gpu elsewhere.

#include <stdexcept>

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

/** A kernel that compiles but that this machine cannot run, with its compiler's words. */
struct NoKernel : std::runtime_error {
  using runtime_error::runtime_error;
};

/** Allocates the outputs and puts the plan's steps on the stream; or throws NoKernel before it does any of that. */
void run(const Plan& plan, const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs,
         mlx::core::Stream s);

/** Holds arrays until the GPU has done what is on the stream. */
void keep(const std::vector<mlx::core::array>& arrays, mlx::core::Stream s);

}  // namespace mlxsae::gpu
