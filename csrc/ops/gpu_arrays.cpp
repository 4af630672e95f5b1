#include "ops/gpu_arrays.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx/primitives.h"

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
  throw std::logic_error("[gpu] unknown type.");
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

}  // namespace

std::vector<mx::array> arrays_of(const Plan& plan, const std::vector<mx::array>& inputs,
                                 std::vector<mx::array>& outputs) {
  std::vector<mx::array> arrays;
  arrays.reserve(plan.buffers.size());
  size_t in = 0, out = 0;
  for (auto& b : plan.buffers) {
    if (b.role == Role::input) {
      arrays.push_back(inputs.at(in++));
    } else if (b.role == Role::output) {
      auto& a = outputs.at(out++);
      if (b.donor >= 0 && inputs.at(b.donor).is_donatable() && inputs[b.donor].nbytes() == a.nbytes())
        a.copy_shared_buffer(inputs[b.donor]);
      arrays.push_back(a);
    } else {
      // Two dimensions, since one holds less than 2^31.
      int width = static_cast<int>(std::min<int64_t>(b.size, 1 << 20));
      arrays.push_back(
          {{static_cast<int>(ceil_div(b.size, std::max(width, 1))), width}, dtype_of(b.type), nullptr, {}});
    }
  }
  return arrays;
}

mx::array product(const Matmul& m, const mx::array& a, const mx::array& b, mx::Stream s) {
  auto left = rows_of(a, 0, m.n, m.d);
  auto right = transposed(rows_of(b, m.first, m.m, m.d));
  auto out = mx::matmul(left, right, s);
  std::vector<mx::array> result{out};
  out.primitive().eval_gpu({left, right}, result);
  return result[0];
}

}  // namespace mlxsae::gpu
