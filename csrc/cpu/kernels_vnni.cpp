// The kernels of avx512, but for the screen: VNNI multiplies its integers, and bfloat16 are multiplied where they can
// be. Compiled for avx512vnni and for avx512bf16 (CMakeLists.txt, mlxsae_kernels).
#include "cpu/kernel_screen.h"

#define MLXSAE_STRING_(x) #x
#define MLXSAE_STRING(x) MLXSAE_STRING_(x)

namespace mlxsae::cpu {

namespace avx512 {
const Kernels& table();
}

namespace MLXSAE_ISA {

const Kernels& table();
const Kernels& table() {
  static const Kernels t = [] {
    Kernels k = avx512::table();
    k.isa = MLXSAE_STRING(MLXSAE_ISA);
#if defined(__AVX512BF16__)
    k.screen[static_cast<int>(ShadowType::bf16)] = screen<Bfloats>;
#endif
    k.screen[static_cast<int>(ShadowType::i16)] = screen<Integers>;
    k.screen[static_cast<int>(ShadowType::i8)] = screen<Bytes>;
    k.shadow_type = ShadowType::i8, k.making_block = 1024, k.making_width = 128;
    return k;
  }();
  return t;
}

}  // namespace MLXSAE_ISA
}  // namespace mlxsae::cpu
