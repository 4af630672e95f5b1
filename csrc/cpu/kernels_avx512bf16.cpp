// The kernels of avx512, but for the screen: here it multiplies bfloat16, and integers by VNNI.
#include "cpu/kernel_screen.h"

namespace mlxsae::cpu {

namespace avx512 {
const Kernels& table();
}

namespace avx512bf16 {

const Kernels& table();
const Kernels& table() {
  static const Kernels t = [] {
    Kernels k = avx512::table();
    k.isa = "avx512bf16";
    k.screen[0] = screen<Bfloats>, k.screen[1] = screen<Integers>;
    k.shadow_type = ShadowType::bf16;
    return k;
  }();
  return t;
}

}  // namespace avx512bf16
}  // namespace mlxsae::cpu
