#pragma once
// Moments in bfloat16: read as float32, stored by stochastic rounding. The same numbers as metal/common/rounding.h,
// which says why.

#include <type_traits>

#include "cpu/simd.h"

namespace mlxsae::cpu::MLXSAE_ISA {

typedef uint32_t vu __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

/** The bits of a float, or of a vector of them. */
template <class V>
using BitsOf = std::conditional_t<sizeof(V) == 4, uint32_t, vu>;

/** A bijection of 32 bits that scatters each of them over all (Wellons, hash-prospector, 2018: "lowbias32"). */
template <class U>
MLXSAE_INLINE U scattered(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/** What the noise of a row's numbers begins with: that of column c is scattered(key + c). */
MLXSAE_INLINE uint32_t noise_key(uint32_t seed, uint32_t row) { return scattered(scattered(seed) ^ row); }

/** The noise of the columns that V takes from `place` = key + column on. */
template <class V>
MLXSAE_INLINE BitsOf<V> noise(uint32_t place) {
  if constexpr (sizeof(V) == 4) {
    return scattered(place);
  } else {
    vu at;
    for (int i = 0; i < kLanes; ++i) at[i] = place + static_cast<uint32_t>(i);
    return scattered(at);
  }
}

/** The bfloat16 bits of v, moved up or down by 16 random bits. NaN stays NaN. */
template <class V, class U = BitsOf<V>>
MLXSAE_INLINE U dithered(V v, U noise) {
  U bits;
  std::memcpy(&bits, &v, sizeof v);
  return ((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bits + noise) >> 16;
}

template <class V>
MLXSAE_INLINE V get(const bf16* p) {
  if constexpr (sizeof(V) == 4)
    return to_float(*p);
  else
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16);
}
MLXSAE_INLINE void put_bits(bf16* p, uint32_t bits) { p->bits = static_cast<uint16_t>(bits); }
MLXSAE_INLINE void put_bits(bf16* p, vu bits) { *reinterpret_cast<vh*>(p) = __builtin_convertvector(bits, vh); }

}  // namespace mlxsae::cpu::MLXSAE_ISA
