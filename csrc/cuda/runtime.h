#pragma once
// What the CUDA room calls of MLX's CUDA backend, of NVRTC and of the driver. All of it is looked up by name in the
// libraries that an MLX with CUDA has loaded already, so that one libmlxsae, built without CUDA, runs with and without:
// no header, no library and no symbol of CUDA is needed to build it or to load it. tests/cuda compares every
// declaration here with the headers of MLX's CUDA wheel.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlxsae::cuda {

/** CUDA's dim3. */
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using Function = struct CUfunc_st*;  // of the driver

/** mlx::core::cu::CommandEncoder: always behind a reference that MLX gives. */
struct Encoder;

/** mlx::core::cu::CudaBuffer: what an array's buffer points to. */
struct Buffer {
  void* data;
  size_t size;
  int device;  // -1: memory that host and device share
};

/** Members of mlx::core::cu and of its CommandEncoder; a member function takes the object first. */
struct MLX {
  Encoder& (*get_command_encoder)(mlx::core::Stream);
  void (*set_input_array)(Encoder*, const mlx::core::array&);
  void (*set_output_array)(Encoder*, const mlx::core::array&);
  void (*add_kernel_node)(Encoder*, Function, Dim3 grid, Dim3 block, Dim3 cluster, uint32_t shared, void** arguments);
  void (*add_completed_handler)(Encoder*, std::function<void()>);
};

/** MLX's functions; throws where this MLX has no CUDA backend or another one. */
const MLX& mlx_cuda();

/** The GPU's compute capability, as 90 for 9.0. */
int capability(int device);

/** Machine code of one kernel of a text for an architecture such as "sm_90"; throws with the compiler's messages. */
std::string compile(const std::string& text, const std::string& kernel, const std::string& architecture);

/** A kernel of machine code, in the current context, for the life of the process. */
Function load(const std::string& code, const std::string& kernel);

/** Most threads of a block of this kernel. */
int most_threads(Function f);

}  // namespace mlxsae::cuda
