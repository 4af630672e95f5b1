// What csrc/cuda/runtime.h declares by hand, against the headers of MLX's CUDA wheel. Only compiled.
#include <cstddef>
#include <type_traits>

#include <cuda.h>

#include "cuda/runtime.h"
#include "mlx/backend/cuda/device.h"

namespace cu = mlx::core::cu;
namespace ours = mlxsae::cuda;
using mlx::core::array;
using E = cu::CommandEncoder;

static_assert(std::is_same_v<decltype(&cu::get_command_encoder), E& (*)(mlx::core::Stream)>);
static_assert(std::is_same_v<decltype(&E::set_input_array), void (E::*)(const array&)>);
static_assert(std::is_same_v<decltype(&E::set_output_array), void (E::*)(const array&)>);
static_assert(std::is_same_v<decltype(&E::add_completed_handler), void (E::*)(std::function<void()>)>);
constexpr void (E::*add)(CUfunction, dim3, dim3, dim3, uint32_t, void**) = &E::add_kernel_node_raw;  // one of three

// By value as MLX takes them, and the same bytes.
static_assert(sizeof(ours::Dim3) == sizeof(dim3) && std::is_trivially_copyable_v<dim3>);
static_assert(offsetof(ours::Dim3, y) == offsetof(dim3, y) && offsetof(ours::Dim3, z) == offsetof(dim3, z));
static_assert(sizeof(ours::Buffer) == sizeof(cu::CudaBuffer) && !std::is_polymorphic_v<cu::CudaBuffer>);
static_assert(offsetof(ours::Buffer, data) == offsetof(cu::CudaBuffer, data));
static_assert(offsetof(ours::Buffer, size) == offsetof(cu::CudaBuffer, size));
static_assert(offsetof(ours::Buffer, device) == offsetof(cu::CudaBuffer, device));
static_assert(std::is_same_v<ours::Function, CUfunction>);

// The driver's numbers.
static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == 75);
static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == 76);
static_assert(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK == 0);
static_assert(std::is_same_v<decltype(&cuModuleLoadData), CUresult (*)(CUmodule*, const void*)>);
static_assert(std::is_same_v<decltype(&cuModuleGetFunction), CUresult (*)(CUfunction*, CUmodule, const char*)>);
static_assert(std::is_same_v<decltype(&cuFuncGetAttribute), CUresult (*)(int*, CUfunction_attribute, CUfunction)>);
static_assert(std::is_same_v<decltype(&cuDeviceGetAttribute), CUresult (*)(int*, CUdevice_attribute, CUdevice)>);
