// The part of Metal's library that our kernels use, in CUDA C++, for texts that cmake/msl_to_cuda.py made of metal/.
// It includes nothing, so that NVRTC compiles it wherever it runs. A simdgroup is a warp, a threadgroup a block.
//
// Every simd operation is one of the whole warp: the kernels keep to that, and their tests refuse anything else
// (tests/metal). Order of sums: a butterfly, the same in every run.

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
static_assert(sizeof(long) == 8, "Metal's long has 64 bits");

#ifndef MSL_EMULATED  // a test compiles this file for a CPU, with its own (tests/cuda/emulation.h)
#define MSL_VALUE(T) const __grid_constant__ T
#define MSL_FUNC __device__ __forceinline__
#define MSL_ALIGN(n) __align__(n)
MSL_FUNC float half_bits_to_float(ushort h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
MSL_FUNC ushort float_to_half_bits(float f) {
  ushort h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
MSL_FUNC ushort float_to_bfloat_bits(float f) {
  ushort b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
  return b;
}
#endif

template <class To, class From>
MSL_FUNC To as_type(From v) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To out;
  memcpy(&out, &v, sizeof(To));
  return out;
}

/** A kernel's buffer: the function that it is passed to says the type. */
struct Pointer {
  void* p;
  template <class T>
  MSL_FUNC operator T*() const {
    return reinterpret_cast<T*>(p);
  }
};

// ---- numbers of 16 bits: storage; arithmetic is in float ------------------------------------------------------------

struct half {
  ushort bits;
  half() = default;
  MSL_FUNC explicit half(float f) : bits(float_to_half_bits(f)) {}
  MSL_FUNC operator float() const { return half_bits_to_float(bits); }
};
struct bfloat {
  ushort bits;
  bfloat() = default;
  MSL_FUNC explicit bfloat(float f) : bits(float_to_bfloat_bits(f)) {}
  MSL_FUNC operator float() const { return as_type<float>(uint(bits) << 16); }
};

// ---- vectors --------------------------------------------------------------------------------------------------------

template <class T, int N>
struct vec;

#define MSL_SUBSCRIPT                               \
  MSL_FUNC T& operator[](int i) { return (&x)[i]; } \
  MSL_FUNC const T& operator[](int i) const { return (&x)[i]; }
template <class T>
struct MSL_ALIGN(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  MSL_FUNC vec(T a, T b) : x(a), y(b) {}
  MSL_SUBSCRIPT
};
template <class T>
struct MSL_ALIGN(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  MSL_FUNC explicit vec(T a) : x(a), y(a), z(a) {}
  MSL_FUNC vec(T a, T b, T c) : x(a), y(b), z(c) {}
  MSL_SUBSCRIPT
};
template <class T>
struct MSL_ALIGN(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  MSL_FUNC explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  MSL_FUNC vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <class U>
  MSL_FUNC explicit vec(const vec<U, 4>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  MSL_SUBSCRIPT
};
#undef MSL_SUBSCRIPT
using float3 = vec<float, 3>;
using float4 = vec<float, 4>;
using bfloat4 = vec<bfloat, 4>;
using half4 = vec<half, 4>;
using uint2 = vec<uint, 2>;
using ulong2 = vec<ulong, 2>;

#define MSL_OPERATOR(op)                                                                \
  MSL_FUNC float4 operator op(const float4& a, const float4& b) {                       \
    return float4(a.x op b.x, a.y op b.y, a.z op b.z, a.w op b.w);                      \
  }                                                                                     \
  MSL_FUNC float4 operator op(const float4& a, float b) { return a op float4(b); }      \
  MSL_FUNC float4 operator op(float a, const float4& b) { return float4(a) op b; }      \
  MSL_FUNC float4& operator op## = (float4 & a, const float4& b) { return a = a op b; } \
  MSL_FUNC float4& operator op## = (float4 & a, float b) { return a = a op float4(b); }
MSL_OPERATOR(+)
MSL_OPERATOR(-)
MSL_OPERATOR(*)
MSL_OPERATOR(/)
#undef MSL_OPERATOR

// ---- functions ------------------------------------------------------------------------------------------------------

#undef INFINITY
#define INFINITY (metal::as_type<float>(0x7f800000u))

#define MSL_EXTREME(T)                               \
  MSL_FUNC T min(T a, T b) { return b < a ? b : a; } \
  MSL_FUNC T max(T a, T b) { return a < b ? b : a; }
MSL_EXTREME(int)
MSL_EXTREME(uint)
MSL_EXTREME(long)
MSL_EXTREME(ulong)
#undef MSL_EXTREME
MSL_FUNC float min(float a, float b) { return fminf(a, b); }
MSL_FUNC float max(float a, float b) { return fmaxf(a, b); }
MSL_FUNC float4 max(const float4& a, const float4& b) {
  return float4(max(a.x, b.x), max(a.y, b.y), max(a.z, b.z), max(a.w, b.w));
}
MSL_FUNC float fabs(float a) { return fabsf(a); }
MSL_FUNC float4 fabs(const float4& a) { return float4(fabsf(a.x), fabsf(a.y), fabsf(a.z), fabsf(a.w)); }
MSL_FUNC float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MSL_FUNC float4 fma(const float4& a, const float4& b, const float4& c) {
  return float4(fma(a.x, b.x, c.x), fma(a.y, b.y, c.y), fma(a.z, b.z, c.z), fma(a.w, b.w, c.w));
}
namespace precise {
MSL_FUNC float sqrt(float a) { return __fsqrt_rn(a); }
MSL_FUNC float4 sqrt(const float4& a) { return float4(sqrt(a.x), sqrt(a.y), sqrt(a.z), sqrt(a.w)); }
}  // namespace precise
MSL_FUNC uint popcount(uint v) { return uint(__popc(v)); }
MSL_FUNC uint clz(uint v) { return uint(__clz(int(v))); }
MSL_FUNC uint ctz(uint v) { return v == 0 ? 32u : uint(__ffs(int(v))) - 1u; }

// ---- places ---------------------------------------------------------------------------------------------------------

struct Place {
  uint x, y;
};
template <class T>
struct As;
template <>
struct As<uint> {
  static MSL_FUNC uint of(Place p) { return p.x; }
};
template <>
struct As<uint2> {
  static MSL_FUNC uint2 of(Place p) { return uint2(p.x, p.y); }
};
template <class T>
MSL_FUNC T place(Place p) {
  return As<T>::of(p);
}
// Threadgroups are rows of threads (csrc/cuda refuses others).
MSL_FUNC Place thread_position_in_grid() { return {blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y}; }
MSL_FUNC Place threadgroup_position_in_grid() { return {blockIdx.x, blockIdx.y}; }
MSL_FUNC Place threadgroups_per_grid() { return {gridDim.x, gridDim.y}; }
MSL_FUNC Place thread_index_in_threadgroup() { return {threadIdx.x, 0}; }
MSL_FUNC Place thread_index_in_simdgroup() { return {threadIdx.x % 32, 0}; }
MSL_FUNC Place simdgroup_index_in_threadgroup() { return {threadIdx.x / 32, 0}; }
MSL_FUNC Place simdgroups_per_threadgroup() { return {(blockDim.x + 31) / 32, 0}; }

// ---- barriers -------------------------------------------------------------------------------------------------------

enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_device_and_threadgroup };
// CUDA's barriers order all memory among the threads that meet.
MSL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

// ---- a warp's operations --------------------------------------------------------------------------------------------

constexpr uint kWarp = 0xffffffffu;

MSL_FUNC uint shuffled(uint v, uint from) { return __shfl_sync(kWarp, v, int(from)); }
MSL_FUNC int shuffled(int v, uint from) { return __shfl_sync(kWarp, v, int(from)); }
MSL_FUNC float shuffled(float v, uint from) { return __shfl_sync(kWarp, v, int(from)); }
template <class T>
MSL_FUNC T simd_shuffle(T v, ushort from) {
  return shuffled(v, from);
}
template <class T>
MSL_FUNC T simd_broadcast_first(T v) {
  return shuffled(v, 0);
}
#define MSL_REDUCTION(name, expression)        \
  template <class T>                           \
  MSL_FUNC T name(T a) {                       \
    for (int step = 16; step > 0; step /= 2) { \
      T b = __shfl_xor_sync(kWarp, a, step);   \
      a = expression;                          \
    }                                          \
    return a;                                  \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_min, min(a, b))
MSL_REDUCTION(simd_max, max(a, b))
#undef MSL_REDUCTION
MSL_FUNC uint simd_prefix_exclusive_sum(uint v) {
  uint lane = threadIdx.x % 32, sum = v;
  for (uint step = 1; step < 32; step *= 2) {
    uint other = __shfl_up_sync(kWarp, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - v;
}
struct simd_vote {
  using vote_t = ulong;
  uint votes;
  MSL_FUNC explicit operator vote_t() const { return votes; }
};
MSL_FUNC simd_vote simd_ballot(bool v) { return {__ballot_sync(kWarp, v)}; }
MSL_FUNC bool simd_any(bool v) { return __any_sync(kWarp, v) != 0; }

// ---- atomics --------------------------------------------------------------------------------------------------------

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
template <class T>
MSL_FUNC void atomic_store_explicit(atomic<T>* a, T v, memory_order) {
  *const_cast<volatile T*>(&a->value) = v;
}
template <class T>
MSL_FUNC T atomic_load_explicit(const atomic<T>* a, memory_order) {
  return *const_cast<const volatile T*>(&a->value);
}
template <class T>
MSL_FUNC T atomic_fetch_add_explicit(atomic<T>* a, T v, memory_order) {
  return atomicAdd(&a->value, v);
}

}  // namespace metal
