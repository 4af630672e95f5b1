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
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "ops/gpu.h"

namespace mlxsae::gpu {

namespace mx = mlx::core;

namespace {

mx::Dtype dtype_of(Type t) {
  switch (t) {
    case Type::f32:
      return mx::float32;
    case Type::f16:
      return mx::float16;
    case Type::bf16:
      return mx::bfloat16;
    case Type::i32:
      return mx::int32;
    case Type::u32:
      return mx::uint32;
    case Type::i64:
      return mx::int64;
    case Type::boolean:
      return mx::bool_;
  }
  throw std::logic_error("[metal] unknown type.");
}

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

/** `rows` rows of a matrix from `first` on, in its memory. */
mx::array rows_of(const mx::array& a, int64_t first, int64_t rows, int64_t d) {
  mx::array view({static_cast<int>(rows), static_cast<int>(d)}, a.dtype(), nullptr, {});
  view.copy_shared_buffer(a, {d, 1}, {true, true, rows <= 1 || d <= 1}, rows * d, first * d);
  return view;
}

mx::array transposed(const mx::array& a) {
  mx::array view({a.shape(1), a.shape(0)}, a.dtype(), nullptr, {});
  view.copy_shared_buffer(a, {1, a.shape(1)}, {true, a.shape(0) <= 1 || a.shape(1) <= 1, true}, a.data_size());
  return view;
}

/** One run of a plan. */
class Run {
 public:
  Run(const Plan& plan, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream s)
      : stream_(s), device_(mx::metal::device(s.device)), encoder_(mx::metal::get_command_encoder(s)) {
    size_t in = 0, out = 0;
    for (auto& b : plan.buffers) {
      temporary_.push_back(false);
      if (b.role == Role::input) {
        arrays_.push_back(inputs.at(in++));
      } else if (b.role == Role::output) {
        auto& a = outputs.at(out++);
        if (b.donor >= 0 && inputs.at(b.donor).is_donatable() && inputs[b.donor].nbytes() == a.nbytes())
          a.copy_shared_buffer(inputs[b.donor]);
        else
          a.set_data(mx::allocator::malloc(a.nbytes()));
        arrays_.push_back(a);
      } else {
        // Two dimensions, since one holds less than 2^31.
        int width = static_cast<int>(std::min<int64_t>(b.size, 1 << 20));
        arrays_.push_back(
            {{static_cast<int>(ceil_div(b.size, std::max(width, 1))), width}, dtype_of(b.type), nullptr, {}});
        temporary_.back() = true;
      }
    }
  }

  void operator()(const Launch& l) {
    auto* kernel = pipeline(device_, l);
    auto threads = l.threads.x * l.threads.y * l.threads.z;
    if (static_cast<int64_t>(kernel->maxTotalThreadsPerThreadgroup()) < threads)
      throw std::runtime_error("[metal] kernel " + l.kernel + " must run with " + std::to_string(threads) +
                               " threads but this GPU allows " +
                               std::to_string(kernel->maxTotalThreadsPerThreadgroup()) + ".");
    encoder_.set_compute_pipeline_state(kernel);
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
    auto a = rows_of(allocated(m.a), 0, m.n, m.d);
    auto b = transposed(rows_of(allocated(m.b), m.first, m.m, m.d));
    auto out = mx::matmul(a, b, stream_);
    std::vector<mx::array> result{out};
    out.primitive().eval_gpu({a, b}, result);
    release(m.out);
    arrays_[m.out] = result[0];
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
    if (temporary_[i] && !a.data_shared_ptr()) a.set_data(mx::allocator::malloc(a.nbytes()));
    return a;
  }
  /** Temporaries live until the GPU has done with them. */
  void release(int i) {
    if (temporary_[i] && arrays_[i].data_shared_ptr()) encoder_.add_temporary(arrays_[i]);
  }

  mx::Stream stream_;
  mx::metal::Device& device_;
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

}  // namespace mlxsae::gpu
