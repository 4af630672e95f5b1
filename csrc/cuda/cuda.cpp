// Plans on NVIDIA GPUs, through the command encoder of MLX's CUDA backend (runtime.h). Kernels are the texts of metal/,
// translated at build time (cmake/msl_to_cuda.py) and compiled by NVRTC when they are first used.
#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "cuda/runtime.h"
#include "cuda/sources.h"
#include "gpu/plans.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/fast.h"
#include "mlx/primitives.h"
#include "ops/gpu.h"
#include "ops/gpu_arrays.h"

namespace mlxsae::gpu {

namespace mx = mlx::core;

namespace {

constexpr int kLeastCapability = 80;  // the kernels convert to bfloat16 in hardware
constexpr int64_t kMostRowsOfGrid = 65535;

std::string architecture(int device) { return "sm_" + std::to_string(cuda::capability(device)); }

std::string text_of(const std::string& library) {
  auto it = cuda_sources().find(library);
  if (it == cuda_sources().end()) throw std::logic_error("[cuda] there is no library " + library + ".");
  return std::string(cuda_header()) + std::string(it->second);
}

cuda::Function kernel(const Launch& l, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, std::string, std::string>, cuda::Function> known;
  std::lock_guard lock(mutex);
  auto& f = known[{device, l.library, l.kernel}];
  if (!f) f = cuda::load(cuda::compile(text_of(l.library), l.kernel, architecture(device)), l.kernel);
  return f;
}

/**
 * Memory of the device for arrays that have none. MLX keeps its allocator to itself, and what it exports,
 * allocator::malloc, gives memory that host and device share, by a synchronous copy where a cached buffer lay on the
 * device. Its own primitives get better: so a kernel object of MLX's with these arrays as outputs, and nothing to do.
 */
void allocate(std::vector<mx::array>& arrays, mx::Stream s) {
  if (arrays.empty()) return;
  static const std::string code = cuda::compile("extern \"C\" __global__ void mlxsae_allocate() {}", "mlxsae_allocate",
                                                architecture(s.device.index));
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  for (auto& a : arrays) {
    shapes.push_back(a.shape());
    types.push_back(a.dtype());
  }
  auto made = mx::fast::precompiled_cuda_kernel("mlxsae_allocate", code, {}, shapes, types, {}, {1, 1, 1}, {1, 1, 1}, 0,
                                                std::nullopt, false, s);
  made[0].primitive().eval_gpu({}, arrays);
}

/** The kernels of a plan's launches, in their order; throws NoKernel where this GPU does not run one. */
std::vector<cuda::Function> kernels_of(const Plan& plan, int device) {
  std::vector<cuda::Function> kernels;
  for (auto& step : plan.steps) {
    auto* l = std::get_if<Launch>(&step);
    if (!l) continue;
    try {
      kernels.push_back(kernel(*l, device));
    } catch (const std::exception& e) {
      throw NoKernel(e.what());
    }
    if (int most = cuda::most_threads(kernels.back()); l->threads.x > most)
      throw NoKernel("[cuda] kernel " + l->kernel + " must run with " + std::to_string(l->threads.x) +
                     " threads but this GPU allows " + std::to_string(most) + ".");
  }
  return kernels;
}

/** One run of a plan. */
class Run {
 public:
  Run(const Plan& plan, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream s)
      : stream_(s),
        kernels_(kernels_of(plan, s.device.index)),
        encoder_(mlx_.get_command_encoder(s)),
        arrays_(arrays_of(plan, inputs, outputs)) {
    std::set<int> products;  // MLX allocates these
    for (auto& step : plan.steps)
      if (auto* m = std::get_if<Matmul>(&step)) products.insert(m->out);
    std::vector<mx::array> missing;
    std::vector<size_t> places;
    for (size_t i = 0; i < arrays_.size(); ++i) {
      if (has_memory(arrays_[i]) || products.count(static_cast<int>(i))) continue;
      missing.push_back(arrays_[i]);
      places.push_back(i);
    }
    allocate(missing, s);
    for (size_t i = 0; i < places.size(); ++i) arrays_[places[i]] = missing[i];
  }

  void operator()(const Launch& l) {
    if (l.threads.y * l.threads.z != 1 || l.groups.z != 1 || l.groups.y > kMostRowsOfGrid)
      throw std::logic_error("[cuda] kernel " + l.kernel + " must have threadgroups in a row but has not.");
    auto f = kernels_[launched_++];
    // A kernel's parameters are its buffers and values in the order of their index.
    std::map<int, void*> pointers;
    std::map<int, void*> parameters;
    for (auto& b : l.bindings) {
      parameters[b.index] = &(pointers[b.index] = nullptr);
      if (b.buffer < 0) continue;
      auto& a = arrays_[b.buffer];
      pointers[b.index] = address(a, b.offset);
      if (b.write)
        mlx_.set_output_array(&encoder_, a);
      else
        mlx_.set_input_array(&encoder_, a);
    }
    for (auto& c : l.arguments) parameters[c.index] = std::visit([](auto& v) { return memory_of(v); }, c.value);
    std::vector<void*> in_order;
    for (auto& [index, p] : parameters) in_order.push_back(p);
    mlx_.add_kernel_node(&encoder_, f, dim(l.groups), dim(l.threads), {0, 0, 0}, 0, in_order.data());
  }

  void operator()(const Matmul& m) {
    keep(m.out);
    arrays_[m.out] = product(m, arrays_[m.a], arrays_[m.b], stream_);
  }

  /** What this run made lives until the GPU has done with it. */
  void end(const Plan& plan) {
    for (size_t i = 0; i < arrays_.size(); ++i)
      if (plan.buffers[i].role == Role::temporary) keep(static_cast<int>(i));
    mlx_.add_completed_handler(&encoder_, [kept = std::move(kept_)] {});
  }

 private:
  static cuda::Dim3 dim(const Size& s) {
    return {static_cast<unsigned>(s.x), static_cast<unsigned>(s.y), static_cast<unsigned>(s.z)};
  }
  /** Not array::data(), which would move the buffer to memory of the host. */
  static void* address(const mx::array& a, int64_t offset) {
    auto* buffer = static_cast<const cuda::Buffer*>(a.buffer().ptr());
    return static_cast<char*>(buffer->data) + a.offset() + offset * static_cast<int64_t>(a.itemsize());
  }
  template <class T>
  static void* memory_of(const T& v) {
    return const_cast<T*>(&v);  // read by add_kernel_node
  }
  static void* memory_of(const Words& v) { return const_cast<uint32_t*>(v.data()); }

  void keep(int i) {
    if (has_memory(arrays_[i])) kept_.push_back(arrays_[i].data_shared_ptr());
  }

  mx::Stream stream_;
  std::vector<cuda::Function> kernels_;
  size_t launched_ = 0;
  const cuda::MLX& mlx_ = cuda::mlx_cuda();
  cuda::Encoder& encoder_;
  std::vector<mx::array> arrays_;  // by buffer
  std::vector<std::shared_ptr<mx::array::Data>> kept_;
};

}  // namespace

const Support& support(const std::string& op) {
  static std::mutex mutex;
  static std::map<std::string, Support> known;
  std::lock_guard lock(mutex);
  if (auto it = known.find(op); it != known.end()) return it->second;
  auto decide = [&]() -> Support {
    if (!find_planned(op) || !mx::cu::is_available()) return {false, ""};
    try {
      cuda::mlx_cuda();
      int device = mx::Device(mx::Device::gpu).index, has = cuda::capability(device);
      if (has < kLeastCapability)
        return {false, "compute capability " + std::to_string(has / 10) + '.' + std::to_string(has % 10)};
      cuda::compile("extern \"C\" __global__ void mlxsae_probe() {}", "mlxsae_probe", architecture(device));
    } catch (const std::exception& e) {
      return {false, e.what()};
    }
    return {true, "cuda"};
  };
  return known.emplace(op, decide()).first->second;
}

const Device& device() {
  static const Device& row = device_for(mx::cu::is_available() ? architecture(mx::Device(mx::Device::gpu).index) : "");
  return row;
}

void run(const Plan& plan, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream s) {
  Run execute(plan, inputs, outputs, s);
  for (auto& step : plan.steps) std::visit([&](auto& s) { execute(s); }, step);
  execute.end(plan);
}

void keep(const std::vector<mx::array>& arrays, mx::Stream s) {
  const auto& mlx = cuda::mlx_cuda();
  mlx.add_completed_handler(&mlx.get_command_encoder(s), [arrays] {});
}

}  // namespace mlxsae::gpu
