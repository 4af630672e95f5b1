#include "ops/common.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <unordered_set>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "gpu/plans.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlxsae {

Checked check_code(const char* op, const mx::array* values, const mx::array& indices,
                   const std::optional<mx::array>& offsets, mx::Stream s) {
  if (!mx::issubdtype(indices.dtype(), mx::integer))
    fail(op, "indices must be integers but got ", indices.dtype(), ".");
  if (!offsets && indices.ndim() != 2) fail(op, "indices must have shape [n, k] but got ", indices.shape(), ".");
  if (offsets) {
    if (indices.ndim() != 1)
      fail(op, "indices must have shape [nnz] where there are offsets but got ", indices.shape(), ".");
    if (!mx::issubdtype(offsets->dtype(), mx::integer) || offsets->ndim() != 1 || offsets->size() == 0)
      fail(op, "offsets must be integers of shape [n + 1] but got ", offsets->dtype(), " ", offsets->shape(), ".");
  }
  if (values) {
    check_float(op, "values", *values);
    if (values->shape() != indices.shape())
      fail(op, "values and indices must have one shape but got ", values->shape(), " and ", indices.shape(), ".");
  }
  auto ids = indices;
  if (mx::size_of(ids.dtype()) == 8)  // what has no place in 32 bits stays out of range
    ids = mx::minimum(mx::astype(ids, mx::uint64, s), mx::array(UINT32_MAX, mx::uint64), s);
  Checked code{mx::astype(ids, mx::uint32, s), std::nullopt, indices.shape(0)};
  if (offsets) {
    code.offsets = mx::stop_gradient(mx::astype(*offsets, mx::int64, s), s);
    code.n = offsets->shape(0) - 1;
  }
  return code;
}

gpu::CodeSize code_size(const mx::array& indices, const std::optional<mx::array>& offsets, gpu::Type type) {
  auto room = static_cast<int64_t>(indices.size());
  if (offsets) return {offsets->shape(0) - 1, 0, room, true, type};
  return {indices.shape(0), indices.shape(1), room, false, type};
}

gpu::Plan FusedPrimitive::plan(const Arrays&, const gpu::Device&) {
  // Not reached: without a kernel the op returns its graph instead of this primitive.
  throw std::logic_error(std::string("[") + name() + "] has no GPU kernel.");
}

namespace {

/** Ops whose kernels turned out not to run on this machine's GPU, and why. */
class Withdrawn {
 public:
  void add(const std::string& op, const std::string& why) {
    std::lock_guard lock(mutex_);
    ops_.emplace(op, why);
  }
  std::optional<std::string> why(const std::string& op) {
    std::lock_guard lock(mutex_);
    auto it = ops_.find(op);
    return it == ops_.end() ? std::nullopt : std::optional(it->second);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::string> ops_;
};

Withdrawn& withdrawn() {
  static Withdrawn ops;
  return ops;
}

/** The op of a primitive: topk_encode of TopKEncode. */
const std::string& op_of(const mx::Primitive& p) {
  auto letters = [](const std::string& name) {
    std::string only;
    for (unsigned char c : name)
      if (c != '_') only += static_cast<char>(std::tolower(c));
    return only;
  };
  for (auto& op : op_names())
    if (letters(op) == letters(p.name())) return op;
  throw std::logic_error(std::string("[") + p.name() + "] is no op's primitive.");
}

/** The values of a graph within an eval: node after node on the stream, as MLX's own loop does it. */
void evaluate(const FusedPrimitive::Graph& graph, const Arrays& inputs, Arrays& outputs, mx::Stream s) {
  Arrays leaves;  // the inputs' data without what made it
  for (auto& a : inputs) leaves.emplace_back(a.shape(), a.dtype(), nullptr, Arrays{}).copy_shared_buffer(a);
  auto results = graph(leaves);
  Arrays nodes;
  std::unordered_set<std::uintptr_t> seen;
  std::function<void(const mx::array&)> visit = [&](const mx::array& a) {
    if (!a.has_primitive() || !seen.insert(a.id()).second) return;
    for (auto& other : a.siblings()) seen.insert(other.id());
    for (auto& in : a.inputs()) visit(in);
    nodes.push_back(a);
  };
  for (auto& r : results) visit(r);
  for (auto& node : nodes) {
    auto made = node.outputs();
    if (s.device == mx::Device::gpu)
      node.primitive().eval_gpu(node.inputs(), made);
    else
      node.primitive().eval_cpu(node.inputs(), made);
  }
  if (s.device == mx::Device::gpu)
    gpu::keep(nodes, s);
  else
    mx::cpu::get_command_encoder(s).dispatch([nodes] {});
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i].copy_shared_buffer(results.at(i));
}

}  // namespace

void FusedPrimitive::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  try {
    gpu::run(plan(inputs, gpu::device()), inputs, outputs, stream());
  } catch (const gpu::NoKernel& e) {
    withdrawn().add(op_of(*this), e.what());
    evaluate(graph_, inputs, outputs, stream());
  }
}

Arrays FusedPrimitive::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  Arrays all;
  for (size_t i = 0, j = 0; i < primals.size(); ++i) {
    bool given = j < argnums.size() && argnums[j] == static_cast<int>(i);
    all.push_back(given ? tangents[j++] : mx::zeros_like(primals[i], stream()));
  }
  return mx::jvp(graph_, primals, all).second;
}

Arrays FusedPrimitive::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                           const Arrays&) {
  auto all = mx::vjp(graph_, primals, cotangents).second;
  Arrays wanted;
  for (int i : argnums) wanted.push_back(all[i]);
  return wanted;
}

std::pair<Arrays, std::vector<int>> FusedPrimitive::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  auto outputs = mx::vmap(graph_, axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

int batch_of(const Arrays& inputs, const std::vector<int>& axes) {
  for (size_t i = 0; i < axes.size(); ++i)
    if (axes[i] >= 0) return inputs[i].shape(axes[i]);
  return 1;
}

std::pair<Arrays, std::vector<int>> vmap_each(const FusedPrimitive::Graph& f, const Arrays& inputs,
                                              const std::vector<int>& axes, mx::Stream s) {
  int batch = batch_of(inputs, axes);
  if (batch == 0) {  // the shapes are those of one element
    Arrays one, outputs;
    for (size_t i = 0; i < axes.size(); ++i) {
      auto shape = inputs[i].shape();
      if (axes[i] >= 0) shape.erase(shape.begin() + axes[i]);
      one.push_back(mx::zeros(shape, inputs[i].dtype(), s));
    }
    for (auto& out : f(one)) {
      auto shape = out.shape();
      shape.insert(shape.begin(), 0);
      outputs.push_back(mx::zeros(shape, out.dtype(), s));
    }
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }
  std::vector<Arrays> results;  // [output][element]
  for (int b = 0; b < batch; ++b) {
    Arrays one;
    for (size_t i = 0; i < axes.size(); ++i)
      one.push_back(axes[i] >= 0 ? mx::take(inputs[i], b, axes[i], s) : inputs[i]);
    auto out = f(one);
    results.resize(out.size());
    for (size_t q = 0; q < out.size(); ++q) results[q].push_back(out[q]);
  }
  Arrays outputs;
  for (auto& r : results) outputs.push_back(mx::stack(r, 0, s));
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

mx::array add_all(const Arrays& terms, mx::Stream s) {
  mx::array total = terms.at(0);
  for (size_t i = 1; i < terms.size(); ++i) total = mx::add(total, terms[i], s);
  return total;
}

const std::vector<std::string>& op_names() {
  static const std::vector<std::string> names{MLXSAE_OP_NAMES};
  return names;
}

namespace {
std::atomic<bool> enabled{true};
}

bool kernels_enabled() { return enabled; }
void enable_kernels(bool on) { enabled = on; }

bool has_kernel(const char* op, mx::Device device) {
  if (!enabled) return false;
  return device == mx::Device::cpu || (gpu::support(op).kernel && !withdrawn().why(op));
}

std::string kernel_for(const std::string& op, mx::Device device) {
  bool known = false;
  for (auto& name : op_names()) known |= name == op;
  if (!known) fail("kernel_for", "there is no op named ", op, ".");
  if (device == mx::Device::cpu) return enabled ? std::string("kernel (") + cpu::kernels().isa + ")" : "fallback";
  const auto& gpu = gpu::support(op);
  auto why = withdrawn().why(op);
  if (enabled && gpu.kernel && !why) return "kernel (" + gpu.text + ")";
  if (!why && !gpu.kernel) why = gpu.text;
  return why && !why->empty() ? "fallback (" + *why + ")" : "fallback";
}

bool products_are_tf32(mx::Device device) {
  const char* given = std::getenv("MLX_ENABLE_TF32");  // as MLX reads it
  return device == mx::Device::gpu && mx::is_available(device) && gpu::device().tf32 && (!given || std::atoi(given));
}

std::string gpu_plan(const std::string& op, const std::map<std::string, gpu::Named::Item>& sizes,
                     const std::string& gpu) {
  auto* row = gpu::find_planned(op);
  if (!row) fail("gpu_plan", "op must have a plan but ", op, " has none.");
  auto device = gpu::device_for(gpu);
  gpu::Named named(sizes);
  device.chunk_bytes = named.get("chunk_bytes", device.chunk_bytes);
  device.simdgroups = named.get("simdgroups", device.simdgroups);
  return row->plan(named, device).json();
}

std::string gpu_plan_of(const mx::array& result, const std::string& gpu) {
  auto* primitive = result.has_primitive() ? dynamic_cast<FusedPrimitive*>(&result.primitive()) : nullptr;
  if (!primitive) fail("gpu_plan_of", "result must come straight from an op with a kernel but does not.");
  mx::eval(result.inputs());  // where they lie in memory counts
  return primitive->plan(result.inputs(), gpu::device_for(gpu)).json();
}

int num_threads() { return cpu::num_threads(); }

void set_num_threads(int n) {
  if (n < 1) fail("set_num_threads", "n must be at least 1 but got ", n, ".");
  cpu::set_num_threads(n);
}

}  // namespace mlxsae
