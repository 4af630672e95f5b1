#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>

#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "mlxsae/ops.h"

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
/** values [n, k] and indices [n, k] of a code; returns the indices as uint32. */
mx::array check_code(const char* op, const mx::array* values, const mx::array& indices, mx::Stream s);

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
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

 protected:
  Graph graph_;
};

/** Does `op` have a kernel of its own on this device? Defined by the backends that are built in. */
bool has_kernel(const char* op, mx::Device device);

/** The sum of those that are there; used to add up tangents. */
mx::array add_all(const Arrays& terms, mx::Stream s);

}  // namespace mlxsae
