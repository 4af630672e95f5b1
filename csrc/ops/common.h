#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>

#include "gpu/code.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "mlxsae/ops.h"
#include "ops/gpu.h"

namespace mlxsae {

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;

/** A throw whose text is streamed: fail("topk_encode", "k must be ... but got k=", k, "."). */
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream msg;
  msg << '[' << op << "] ";
  (msg << ... << parts);
  throw std::invalid_argument(msg.str());
}

inline bool is_float(mx::Dtype t) { return t == mx::float32 || t == mx::float16 || t == mx::bfloat16; }

inline void check_float(const char* op, const char* name, const mx::array& a) {
  if (!is_float(a.dtype())) fail(op, name, " must be float32, float16 or bfloat16 but got ", a.dtype(), ".");
}
inline void check_matrix(const char* op, const char* name, const mx::array& a) {
  check_float(op, name, a);
  if (a.ndim() != 2) fail(op, name, " must have 2 dimensions but got shape ", a.shape(), ".");
}
inline void check_vector(const char* op, const char* name, const mx::array& a, int size, const char* size_name) {
  check_float(op, name, a);
  if (a.ndim() != 1 || a.shape(0) != size)
    fail(op, name, " must have shape [", size_name, "] = [", size, "] but got ", a.shape(), ".");
}
/** A code that has been looked at: indices as uint32, offsets as int64 where there are any, and the number of its rows.
 */
struct Checked {
  mx::array indices;
  std::optional<mx::array> offsets;
  int n;
};
/** values and indices [n, k]; or, with offsets [n + 1], [nnz]. */
Checked check_code(const char* op, const mx::array* values, const mx::array& indices,
                   const std::optional<mx::array>& offsets, mx::Stream s);

inline gpu::Type gpu_type(const mx::array& a) {
  return a.dtype() == mx::float32 ? gpu::Type::f32 : a.dtype() == mx::float16 ? gpu::Type::f16 : gpu::Type::bf16;
}
/** A code as plans see it: what is [n, k], or with offsets [nnz]. */
gpu::CodeSize code_size(const mx::array& indices, const std::optional<mx::array>& offsets,
                        gpu::Type type = gpu::Type::f32);
/** Whether a kernel may read the rows of an evaluated matrix in whole vectors. */
inline bool aligned_rows(const mx::array& a) {
  return a.offset() % gpu::kVectorBytes == 0 &&
         a.shape(-1) * static_cast<int64_t>(a.itemsize()) % gpu::kVectorBytes == 0;
}

/** What an eval sees: row-contiguous arrays. A transposed view of a feature-major array is recognised, not copied. */
inline mx::array normal(const mx::array& a, mx::Stream s) { return mx::contiguous(a, false, s); }

/**
 * A primitive with a definition in plain MLX ops. The definition gives whatever derivative or vectorisation a primitive
 * does not write itself, and replaces the primitive on devices without a kernel. (mlx::core::fast::Custom is the same
 * idea, but libmlx does not export it.)
 */
class FusedPrimitive : public mx::Primitive {
 public:
  using Graph = std::function<Arrays(const Arrays&)>;
  FusedPrimitive(mx::Stream s, Graph graph) : Primitive(s), graph_(std::move(graph)) {}

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  /** What a GPU does for this primitive, with its inputs and outputs in their order. Defined where there are kernels.
   */
  virtual gpu::Plan plan(const Arrays& inputs, const gpu::Device& device);
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

 protected:
  Graph graph_;
};

/** A primitive on a code. Where the code is in compressed rows, its offsets are the last input. */
class CodePrimitive : public FusedPrimitive {
 public:
  CodePrimitive(mx::Stream s, Graph graph, bool csr) : FusedPrimitive(s, std::move(graph)), csr_(csr) {}
  bool is_equivalent(const mx::Primitive& other) const override {
    return static_cast<const CodePrimitive&>(other).csr_ == csr_;
  }

 protected:
  std::optional<mx::array> offsets_of(const Arrays& in) const { return csr_ ? std::optional(in.back()) : std::nullopt; }
  /** Input i, if there is one before the offsets. */
  std::optional<mx::array> optional(const Arrays& in, size_t i) const {
    return i + csr_ < in.size() ? std::optional(in[i]) : std::nullopt;
  }
  bool csr_;
};

/** The length of the axes that are batched; 1 where none is. */
int batch_of(const Arrays& inputs, const std::vector<int>& axes);

/** vmap, one element of the batch after the other: for ops whose batch is no bigger problem of the same kind. */
std::pair<Arrays, std::vector<int>> vmap_each(const FusedPrimitive::Graph& f, const Arrays& inputs,
                                              const std::vector<int>& axes, mx::Stream s);

/** Does `op` have a kernel of its own on this device? Defined by the backends that are built in. */
bool has_kernel(const char* op, mx::Device device);

/** The sum of those that are there; used to add up tangents. */
mx::array add_all(const Arrays& terms, mx::Stream s);

}  // namespace mlxsae
