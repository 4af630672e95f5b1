#pragma once
// Rows of float32, float16 or bfloat16 in the hands of a simdgroup: a thread takes V consecutive numbers, its neighbour
// the next V, so that one access of the 32 threads is one contiguous piece. V is 4 where rows are whole such pieces at
// aligned addresses, else 1. Arithmetic is in float32.

#include <metal_stdlib>

using namespace metal;

constant constexpr uint kSimd = 32;  // threads of a simdgroup, on every Apple GPU

template <int V>
struct LanesOf;
template <>
struct LanesOf<1> {
  using type = float;
};
template <>
struct LanesOf<4> {
  using type = float4;
};
/** V numbers of one thread. */
template <int V>
using Lanes = typename LanesOf<V>::type;

template <typename T, int V>
METAL_FUNC Lanes<V> load(const device T* p) {
  if constexpr (V == 4)
    return float4(*reinterpret_cast<const device vec<T, 4>*>(p));
  else
    return float(*p);
}

template <typename T, int V>
METAL_FUNC void store(device T* p, Lanes<V> v) {
  if constexpr (V == 4)
    *reinterpret_cast<device vec<T, 4>*>(p) = vec<T, 4>(v);
  else
    *p = T(v);
}

METAL_FUNC float sum(float v) { return v; }
METAL_FUNC float sum(float4 v) { return (v.x + v.y) + (v.z + v.w); }

/** s * a + b, rounded once. */
METAL_FUNC float scaled(float s, float a, float b) { return fma(s, a, b); }
METAL_FUNC float4 scaled(float s, float4 a, float4 b) { return fma(float4(s), a, b); }

// A type that is known at the launch only, for arrays that are not worth a kernel each: the branch is the same for all
// threads. The numbers are those of Type in csrc/gpu/plan.h.
constant constexpr uint kF32 = 0, kF16 = 1;

template <int V>
METAL_FUNC Lanes<V> load_any(const device char* p, uint type, ulong i) {
  if (type == kF32) return load<float, V>(reinterpret_cast<const device float*>(p) + i);
  if (type == kF16) return load<half, V>(reinterpret_cast<const device half*>(p) + i);
  return load<bfloat, V>(reinterpret_cast<const device bfloat*>(p) + i);
}

template <int V>
METAL_FUNC void store_any(device char* p, uint type, ulong i, Lanes<V> v) {
  if (type == kF32)
    store<float, V>(reinterpret_cast<device float*>(p) + i, v);
  else if (type == kF16)
    store<half, V>(reinterpret_cast<device half*>(p) + i, v);
  else
    store<bfloat, V>(reinterpret_cast<device bfloat*>(p) + i, v);
}

// Tests on bits: a compiler in fast-math mode may assume that NaN does not occur.
METAL_FUNC float not_a_number() { return as_type<float>(0x7fc00000u); }
METAL_FUNC bool is_finite(float v) { return (as_type<uint>(v) & 0x7f800000u) != 0x7f800000u; }
/** v > 0 or NaN: the feature fires. */
METAL_FUNC bool is_firing(float v) { return as_type<int>(v) > 0 || (as_type<uint>(v) & 0x7fffffffu) > 0x7f800000u; }
/** v != 0: the slot is used. */
METAL_FUNC bool is_used(float v) { return (as_type<uint>(v) & 0x7fffffffu) != 0; }
