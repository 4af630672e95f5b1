#include <bit>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace mlxsae::cpu {

#define MLXSAE_DECLARE(isa) \
  namespace isa {           \
  const Kernels& table();   \
  }
MLXSAE_DECLARE(avx512bf16)
MLXSAE_DECLARE(avx512vnni)
MLXSAE_DECLARE(avx512)
MLXSAE_DECLARE(avx2)
MLXSAE_DECLARE(neon)
MLXSAE_DECLARE(plain)
#undef MLXSAE_DECLARE

namespace {

/** The sets that were compiled in and that this processor runs, best first. */
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> sets;
#if defined(MLXSAE_HAS_avx512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512vnni")) {
      if (__builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512bf16::table());
      sets.push_back(&avx512vnni::table());
    }
    sets.push_back(&avx512::table());
  }
#endif
#if defined(MLXSAE_HAS_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2::table());
#endif
#if defined(MLXSAE_HAS_neon)
  sets.push_back(&neon::table());
#endif
#if defined(MLXSAE_HAS_plain)
  sets.push_back(&plain::table());
#endif
  return sets;
}

const Kernels& choose() {
  auto sets = usable();
  const char* wanted = std::getenv("MLXSAE_CPU_ISA");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (auto* s : sets) {
    if (std::string(wanted) == s->isa) return *s;
    names += (names.empty() ? "" : ", ") + std::string(s->isa);
  }
  throw std::invalid_argument("MLXSAE_CPU_ISA must be one of " + names + " on this machine but got " + wanted + ".");
}

}  // namespace

void throw_bad_alloc() { throw std::bad_alloc(); }

int32_t order_key(float v) {
  if (v != v) return INT32_MAX;
  int32_t b = std::bit_cast<int32_t>(v + 0.0f);
  return b ^ ((b >> 31) & 0x7fffffff);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mlxsae::cpu
