// The kernels of one instruction set; compiled once for each but avx512vnni and avx512bf16 (CMakeLists.txt,
// mlxsae_kernels).
#include "cpu/kernels.h"

#include "cpu/kernel_dense.h"
#include "cpu/kernel_encode.h"
#include "cpu/kernel_screen.h"
#include "cpu/kernel_sparse.h"
#include "cpu/kernel_update.h"

#define MLXSAE_STRING_(x) #x
#define MLXSAE_STRING(x) MLXSAE_STRING_(x)

namespace mlxsae::cpu::MLXSAE_ISA {

const Kernels& table();
const Kernels& table() {
  static const Kernels t{
      .isa = MLXSAE_STRING(MLXSAE_ISA),
      .panel = kPanel,
      .token_block = 2 * kTileVectors * kLanes,
      .screen_block = kLanes < 16 ? 64 : 256,
      .making_block = 512,
#if defined(__AVX512F__)
      .making_width = 1 << 30,  // without VNNI a product of integers is hardly faster than float32's
#else
      .making_width = 512,
#endif
      .encode = encode,
      .merge = merge,
      .above = above,
      .decode = decode,
      .gather_dot = gather_dot,
      .outer = outer,
      .update = update,
      .gather = gather_apart,
      .finish = finish_apart,
      .catch_up = catch_up,
      .product = product,
      .panel_of = panel_of,
      .turned_panel_of = turned_panel_of,
      .entries_of = entries_of,
#if defined(__AVX2__)
      .screen = {nullptr, screen<Integers>, nullptr},
      .shadow_type = ShadowType::i16,
#else
      .screen = {nullptr, nullptr, nullptr},
      .shadow_type = ShadowType::bf16,
#endif
      .shadow = shadow,
      .estimate = estimate,
      .rescore = rescore,
      .adam = adam_vector,
      .subtract = subtract,
      .residual = residual,
  };
  return t;
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
