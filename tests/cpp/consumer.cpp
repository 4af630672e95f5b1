// Another MLX app that embeds the kernels: encodes, decodes, takes a gradient. Prints the reconstruction error.
#include <cstdio>

#include "mlx/mlx.h"
#include "mlxsae/ops.h"

namespace mx = mlx::core;

int main() {
  auto x = mx::random::normal({8, 16}), w = mx::random::normal({64, 16});
  auto loss = [&](const mx::array& w) {
    auto [values, indices] = mlxsae::topk_encode(x, w, std::nullopt, 4);
    return mx::mean(mx::square(mx::subtract(mlxsae::sparse_decode(values, indices, w), x)));
  };
  auto [value, grad] = mx::value_and_grad(loss)(w);
  auto norm = mx::sum(mx::square(grad));
  mx::eval(value, norm);
  std::printf("mlxsae %s error %g gradient %g %s\n", MLXSAE_VERSION, value.item<float>(), norm.item<float>(),
              mlxsae::kernel_for("topk_encode", mx::Device::cpu).c_str());
  return norm.item<float>() > 0 ? 0 : 1;
}
