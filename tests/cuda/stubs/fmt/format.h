// In the place of a header that MLX's CUDA headers include and its wheels do not have.
#pragma once
#include <string>
#include <string_view>

namespace fmt {
template <class... Values>
std::string format(std::string_view pattern, const Values&...) {
  return std::string(pattern);
}
}  // namespace fmt
