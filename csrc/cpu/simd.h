#pragma once
// Vectors of float32 and int32 over the compiler's vector extensions. This file is compiled once per instruction set
// (MLXSAE_ISA), everything in a namespace of that name, so that no symbol of one set can be linked into another.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef MLXSAE_ISA
#error "MLXSAE_ISA names the instruction set: avx512, avx2, neon or plain"
#endif

#define MLXSAE_INLINE inline __attribute__((always_inline))
#define MLXSAE_UNROLL _Pragma("GCC unroll 32")

namespace mlxsae::cpu::MLXSAE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

MLXSAE_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
MLXSAE_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi*>(p); }
MLXSAE_INLINE void store(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
MLXSAE_INLINE vf splat(float x) { return x - vf{}; }
MLXSAE_INLINE vi splat(int32_t x) { return x - vi{}; }

/** The upper half onto the lower one until one number is left: the same bits from every way to do it. */
MLXSAE_INLINE float sum(vf v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                              _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#else
  __m256 half = (__m256)v;
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float s[kLanes];
  store(s, v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) s[i] += s[i + w];
  return s[0];
#endif
}
MLXSAE_INLINE int32_t sum(vi v) {
  int32_t s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

/** Bit i is set where a[i] <= b[i] is false: greater, or either one is NaN. */
MLXSAE_INLINE uint32_t not_le(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ));
#else
  vi le = a <= b;  // -1 where true
  uint32_t m = 0;
  for (int i = 0; i < kLanes; ++i) m |= static_cast<uint32_t>(le[i] == 0) << i;
  return m;
#endif
}

#if defined(__AVX2__)
/** Bit i is set where a[i] >= b[i]: not where either one is NaN. For the screens, which only x86 has. */
MLXSAE_INLINE uint32_t at_least(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#endif
}
#endif

/** Is a[i] <= b[i] false anywhere? */
MLXSAE_INLINE bool any_not_le(vf a, vf b) {
#if defined(__ARM_NEON)
  return vminvq_u32(vcleq_f32((float32x4_t)a, (float32x4_t)b)) == 0;
#else
  return not_le(a, b) != 0;
#endif
}

MLXSAE_INLINE vf sqrt(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#elif defined(__ARM_NEON)
  return (vf)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

template <int locality = 3>
MLXSAE_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, locality);
}

template <class V>
MLXSAE_INLINE V get(const float* p) {
  if constexpr (sizeof(V) == 4)
    return *p;
  else
    return load(p);
}
MLXSAE_INLINE void put(float* p, float v) { *p = v; }
MLXSAE_INLINE void put(float* p, vf v) { store(p, v); }
MLXSAE_INLINE float sqrt(float v) { return __builtin_sqrtf(v); }

/** body.operator()<V>(c) over [0, d): whole vectors, then single floats. */
template <class Body>
MLXSAE_INLINE void lanes(int64_t d, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) body.template operator()<vf>(c);
  for (; c < d; ++c) body.template operator()<float>(c);
}

/** A sum that has a part in vectors and a part in single floats. */
struct Sum {
  vf wide{};
  float rest = 0;
  MLXSAE_INLINE void add(vf v) { wide += v; }
  MLXSAE_INLINE void add(float v) { rest += v; }
  MLXSAE_INLINE float total() const { return sum(wide) + rest; }
};

// ---- element types: storage of 16 bits, arithmetic in float32
// --------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
#if defined(__aarch64__)
typedef __fp16 half;  // GCC 12 has no _Float16 in C++ there
#else
typedef _Float16 half;
#endif
struct f16 {
  half value;
};

MLXSAE_INLINE float to_float(float x) { return x; }
MLXSAE_INLINE float to_float(f16 x) { return static_cast<float>(x.value); }
MLXSAE_INLINE float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T>
MLXSAE_INLINE T from_float(float x);
template <>
MLXSAE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
MLXSAE_INLINE f16 from_float<f16>(float x) {
  return {static_cast<half>(x)};
}
template <>
MLXSAE_INLINE bf16 from_float<bf16>(float x) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

/** Row of d elements as float32: the row itself, or its conversion in `scratch`. */
template <class T>
MLXSAE_INLINE const float* as_float(const T* row, float* scratch, int64_t d) {
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<const float*>(row);
  } else {
    for (int64_t i = 0; i < d; ++i) scratch[i] = to_float(row[i]);
    return scratch;
  }
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
