// CUDA's side of csrc/cuda/msl.cuh on the machine of tests/metal/msl: a block is a threadgroup of fibers, so the CUDA
// text of our kernels runs on a CPU. Included before msl.cuh.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "hooks.h"

#define MSL_EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static  // blocks run one after the other
#define MSL_VALUE(T) const T&
#define MSL_FUNC inline
#define MSL_ALIGN(n) alignas(n)

namespace cuda_on_cpu {

struct Index {
  unsigned x, y, z;
};
inline Index index(const msl::U3& v) { return {v.x, v.y, v.z}; }

template <class T>
struct Lanes {
  T v[32];
};
/** Every lane's value. All 32 must come: that is what a full mask says. */
template <class T>
inline Lanes<T> exchange(T v, int operation) {
  uint32_t active = 0;
  const unsigned char* rows = msl_exchange(&v, sizeof(T), operation, nullptr, &active);
  if (active != 0xffffffffu) msl_misuse("a warp's operation misses lanes", nullptr);
  Lanes<T> all;
  for (int i = 0; i < 32; ++i) memcpy(&all.v[i], rows + 64 * i, sizeof(T));
  return all;
}
inline int lane() { return int(msl_self()->lane); }

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::index(msl_self()->position_in_group))
#define blockIdx (cuda_on_cpu::index(msl_self()->group))
#define blockDim (cuda_on_cpu::index(msl_self()->full_group_size))
#define gridDim (cuda_on_cpu::index(msl_self()->groups))

inline void __syncthreads() { msl_threadgroup_barrier(3, nullptr); }
inline void __syncwarp() { msl_simdgroup_barrier(3, nullptr); }
template <class T>
inline T __shfl_sync(unsigned, T v, int from) {
  return cuda_on_cpu::exchange(v, 40).v[from & 31];
}
template <class T>
inline T __shfl_xor_sync(unsigned, T v, int mask) {
  return cuda_on_cpu::exchange(v, 41).v[cuda_on_cpu::lane() ^ mask];
}
template <class T>
inline T __shfl_up_sync(unsigned, T v, unsigned by) {
  int from = cuda_on_cpu::lane() - int(by);
  return cuda_on_cpu::exchange(v, 42).v[from < 0 ? cuda_on_cpu::lane() : from];
}
inline unsigned __ballot_sync(unsigned, bool v) {
  auto all = cuda_on_cpu::exchange(v, 60);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(all.v[i]) << i;
  return votes;
}
inline int __any_sync(unsigned mask, bool v) { return __ballot_sync(mask, v) != 0; }
template <class T>
inline T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }

namespace metal {
inline float half_bits_to_float(unsigned short h) {
  _Float16 f;
  memcpy(&f, &h, sizeof f);
  return float(f);
}
inline unsigned short float_to_half_bits(float f) {
  _Float16 h = _Float16(f);
  unsigned short bits;
  memcpy(&bits, &h, sizeof bits);
  return bits;
}
inline unsigned short float_to_bfloat_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
}  // namespace metal
