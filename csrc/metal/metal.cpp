// Plans on Apple GPUs, through MLX's Metal device and command encoder.
#include <dlfcn.h>

#include <bit>
#include <filesystem>
#include <map>
#include <mutex>
#include <type_traits>

#include "gpu/plans.h"
#include "metal/sources.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "mlx/backend/metal/metal.h"
#include "ops/gpu.h"
#include "ops/gpu_arrays.h"

namespace mlxsae::gpu {

namespace mx = mlx::core;

namespace {

/** Where libmlxsae lies, and mlxsae.metallib beside it where the build made one. */
const std::string& own_folder() {
  static const std::string folder = [] {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void*>(&own_folder), &info)) return std::string();
    return std::filesystem::path(info.dli_fname).parent_path().string();
  }();
  return folder;
}

/** Kernels compiled ahead of time where there are such, else compiled now from the source in this library. */
MTL::Library* library(mx::metal::Device& d, const std::string& name) {
  static const bool ahead = std::filesystem::exists(std::filesystem::path(own_folder()) / "mlxsae.metallib");
  if (ahead) return d.get_library("mlxsae", own_folder());
  return d.get_library("mlxsae_" + name, [&] { return std::string(source_of(name)); });
}

MTL::DataType data_type(const Value& v) {
  static constexpr MTL::DataType types[] = {MTL::DataTypeBool, MTL::DataTypeInt,   MTL::DataTypeUInt,
                                            MTL::DataTypeLong, MTL::DataTypeFloat, MTL::DataTypeNone};
  return types[v.index()];
}

std::string in_words(const Value& v) {
  return std::visit(
      [](const auto& x) -> std::string {
        using X = std::decay_t<decltype(x)>;
        if constexpr (std::is_same_v<X, Words>)
          throw std::logic_error("[metal] a function constant must be one number.");
        else if constexpr (std::is_same_v<X, float>)
          return std::to_string(std::bit_cast<uint32_t>(x));
        else
          return std::to_string(x);
      },
      v);
}

/** MLX keeps what it made. */
MTL::ComputePipelineState* pipeline(mx::metal::Device& d, const Launch& l) {
  mx::metal::MTLFCList constants;
  std::string name = l.kernel;
  for (auto& c : l.constants) {
    const void* p = std::visit([](const auto& x) -> const void* { return &x; }, c.value);
    constants.emplace_back(p, data_type(c.value), c.index);
    name += '_' + std::to_string(c.index) + ':' + in_words(c.value);
  }
  return d.get_kernel(l.kernel, library(d, l.library), name, constants);
}

using Kernels = std::vector<MTL::ComputePipelineState*>;

/** The kernels of a plan's launches, in their order; throws NoKernel where this GPU does not run one. */
Kernels kernels_of(const Plan& plan, mx::metal::Device& d) {
  Kernels kernels;
  for (auto& step : plan.steps) {
    auto* l = std::get_if<Launch>(&step);
    if (!l) continue;
    try {
      kernels.push_back(pipeline(d, *l));
    } catch (const std::exception& e) {
      throw NoKernel(e.what());
    }
    auto threads = l->threads.x * l->threads.y * l->threads.z;
    if (auto most = static_cast<int64_t>(kernels.back()->maxTotalThreadsPerThreadgroup()); most < threads)
      throw NoKernel("[metal] kernel " + l->kernel + " must run with " + std::to_string(threads) +
                     " threads but this GPU allows " + std::to_string(most) + ".");
  }
  return kernels;
}

/** One run of a plan. */
class Run {
 public:
  Run(const Plan& plan, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream s)
      : stream_(s),
        kernels_(kernels_of(plan, mx::metal::device(s.device))),
        encoder_(mx::metal::get_command_encoder(s)),
        arrays_(arrays_of(plan, inputs, outputs)) {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      temporary_.push_back(plan.buffers[i].role == Role::temporary);
      if (plan.buffers[i].role == Role::output) allocated(static_cast<int>(i));
    }
  }

  void operator()(const Launch& l) {
    encoder_.set_compute_pipeline_state(kernels_[launched_++]);
    // Metal wants something at every argument: one that is never touched gets what another has.
    int any = 0;
    for (auto& b : l.bindings) any = std::max(any, b.buffer);
    for (auto& b : l.bindings) {
      auto& a = allocated(b.buffer < 0 ? any : b.buffer);
      int64_t offset = b.offset * static_cast<int64_t>(a.itemsize());
      if (b.write)
        encoder_.set_output_array(a, b.index, offset);
      else
        encoder_.set_input_array(a, b.index, offset);
    }
    for (auto& c : l.arguments) std::visit([&](const auto& v) { set(v, c.index); }, c.value);
    encoder_.dispatch_threadgroups(MTL::Size(l.groups.x, l.groups.y, l.groups.z),
                                   MTL::Size(l.threads.x, l.threads.y, l.threads.z));
  }

  /** MLX's own product, whose eval allocates its output: a fresh one from MLX's cache of buffers each time. */
  void operator()(const Matmul& m) {
    auto out = product(m, allocated(m.a), allocated(m.b), stream_);
    release(m.out);
    arrays_[m.out] = out;
  }

  ~Run() {
    for (size_t i = 0; i < arrays_.size(); ++i) release(static_cast<int>(i));
  }

 private:
  template <class T>
  void set(const T& v, int index) {
    encoder_.set_bytes(v, index);
  }
  void set(const Words& v, int index) { encoder_.set_vector_bytes(v, index); }

  mx::array& allocated(int i) {
    auto& a = arrays_[i];
    if (!has_memory(a)) a.set_data(mx::allocator::malloc(a.nbytes()));
    return a;
  }
  /** Temporaries live until the GPU has done with them. */
  void release(int i) {
    if (temporary_[i] && has_memory(arrays_[i])) encoder_.add_temporary(arrays_[i]);
  }

  mx::Stream stream_;
  Kernels kernels_;
  size_t launched_ = 0;
  mx::metal::CommandEncoder& encoder_;
  std::vector<mx::array> arrays_;  // by buffer
  std::vector<bool> temporary_;
};

}  // namespace

const Support& support(const std::string& op) {
  static std::mutex mutex;
  static std::map<std::string, Support> known;
  std::lock_guard lock(mutex);
  if (auto it = known.find(op); it != known.end()) return it->second;
  auto decide = [&]() -> Support {
    auto* row = find_planned(op);
    if (!row) return {false, ""};
    if (!mx::metal::is_available()) return {false, "no Metal device"};
    try {
      for (auto* name : row->libraries) library(mx::metal::device(mx::Device::gpu), name);
    } catch (const std::exception& e) {
      return {false, e.what()};
    }
    return {true, "metal"};
  };
  return known.emplace(op, decide()).first->second;
}

const Device& device() {
  static const Device& row = device_for(mx::metal::device(mx::Device::gpu).get_architecture());
  return row;
}

void run(const Plan& plan, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream s) {
  Run execute(plan, inputs, outputs, s);
  for (auto& step : plan.steps) std::visit(execute, step);
}

void keep(const std::vector<mx::array>& arrays, mx::Stream s) {
  mx::metal::get_command_encoder(s).add_temporaries(arrays);
}

}  // namespace mlxsae::gpu
