// Stands for <metal_stdlib> in the strict compile: OpenCL C++ without a generic address space has MSL's rules for
// pointers, so a compiler that knows nothing of Metal finds them broken. Declarations only: nothing runs.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define kernel
#define METAL_FUNC inline

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
// OpenCL's own names, which are not Metal's.
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_float msl_atomic_float
#define atomic_bool msl_atomic_bool
#define memory_order msl_memory_order
#define memory_order_relaxed msl_memory_order_relaxed
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef __bf16 bfloat;

namespace metal {

// ---- traits
template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class A, class C>
struct conditional {
  using type = A;
};
template <class A, class C>
struct conditional<false, A, C> {
  using type = C;
};
template <bool B, class A, class C>
using conditional_t = typename conditional<B, A, C>::type;
template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <class T>
struct remove_cv {
  using type = __remove_cv(T);
};
template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_const_t = __remove_const(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
constexpr bool is_signed_v = __is_signed(T);
template <class T>
struct is_signed : bool_constant<__is_signed(T)> {};
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <class A, class B>
constexpr bool is_convertible_v = __is_convertible(A, B);
template <class T>
struct make_unsigned {
  using type = __make_unsigned(T);
};
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class... B>
struct disjunction : bool_constant<(false || ... || B::value)> {};
template <class... B>
struct conjunction : bool_constant<(true && ... && B::value)> {};

template <class T>
struct numeric_limits {
  static constexpr bool is_signed = T(-1) < T(0);
  static constexpr T min() { return is_signed ? T(T(1) << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T max() { return T(~min()); }
  static constexpr T lowest() { return min(); }
};
#define MSL_LIMITS(T, MIN, MAX, EPSILON)                             \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr T min() { return T(MIN); }                      \
    static constexpr T max() { return T(MAX); }                      \
    static constexpr T lowest() { return T(-(MAX)); }                \
    static constexpr T epsilon() { return T(EPSILON); }              \
    static constexpr T infinity() { return (T)__builtin_inff(); }    \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
  };
MSL_LIMITS(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f)
MSL_LIMITS(half, 0x1p-14f, 65504.f, 0x1p-10f)
MSL_LIMITS(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f)
#undef MSL_LIMITS

// ---- vectors
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <class V>
struct shape {
  using element = V;
  static constexpr int n = 1;
};
template <class T, int N>
struct packed_vec {
  T d[N];
  thread T& operator[](int i) thread;
  T operator[](int i) const thread;
  device T& operator[](int i) device;
  T operator[](int i) const device;
  T operator[](int i) const constant;
  operator vec<T, N>() const thread;
  operator vec<T, N>() const device;
  operator vec<T, N>() const constant;
};
#define MSL_WIDTH(T, N)                               \
  typedef T T##N __attribute__((ext_vector_type(N))); \
  typedef packed_vec<T, N> packed_##T##N;             \
  template <>                                         \
  struct shape<T##N> {                                \
    using element = T;                                \
    static constexpr int n = N;                       \
  };
#define MSL_VECTORS(T) MSL_WIDTH(T, 2) MSL_WIDTH(T, 3) MSL_WIDTH(T, 4)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
#undef MSL_VECTORS
#undef MSL_WIDTH
// What comparing vectors of 32-bit elements gives here.
typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;
// float4(a, b, ...) arrives here as metal::make<float4>(a, b, ...): clang has no such constructor for its vectors.
template <class V>
V make() {
  return V(0);
}
template <class V, class A>
V make(A a) {
  if constexpr (shape<A>::n == 1)
    return V((typename shape<V>::element)a);
  else {
    static_assert(shape<A>::n == shape<V>::n, "vector constructor: component count");
    return __builtin_convertvector(a, V);
  }
}
template <class V, class A, class B, class... R>
V make(A, B, R...) {
  static_assert(shape<A>::n + shape<B>::n + (0 + ... + shape<R>::n) == shape<V>::n,
                "vector constructor: component count");
  return V(0);
}
template <class P, class... A>
P make_packed(A...);
template <class To, class From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, from);
}
template <class T, size_t N>
struct array {
  T elements[N];
  thread T& operator[](size_t i) thread;
  T operator[](size_t i) const thread;
};

// ---- functions. The element types that Metal's have: no simd operation on bfloat, bool or 64 bits, no real one on
// bfloat.
template <class T>
constexpr bool is_real = is_same_v<typename shape<T>::element, float> || is_same_v<typename shape<T>::element, half>;
template <class T>
constexpr bool in_simd =
    is_real<T> || (is_integral_v<typename shape<T>::element> && !is_same_v<typename shape<T>::element, bool> &&
                   sizeof(typename shape<T>::element) <= 4);
template <class T>
using if_real = enable_if_t<is_real<T>, int>;
template <class T>
using if_simd = enable_if_t<in_simd<T>, int>;
template <class T>
struct same_as {
  using type = T;
};
template <class T>
using also = typename same_as<T>::type;  // converts to the type that the first argument gives

#define MSL_REAL1(name)              \
  template <class T, if_real<T> = 0> \
  T name(T);                         \
  float name(bfloat);
#define MSL_REAL2(name)              \
  template <class T, if_real<T> = 0> \
  T name(T, also<T>);
// clang-format off
#define MSL_REALS                                                                                                      \
  MSL_REAL1(exp) MSL_REAL1(exp2) MSL_REAL1(exp10) MSL_REAL1(log) MSL_REAL1(log2) MSL_REAL1(log10) MSL_REAL1(sqrt)      \
  MSL_REAL1(rsqrt) MSL_REAL1(sin) MSL_REAL1(cos) MSL_REAL1(tan) MSL_REAL1(asin) MSL_REAL1(acos) MSL_REAL1(atan)        \
  MSL_REAL1(sinh) MSL_REAL1(cosh) MSL_REAL1(tanh) MSL_REAL1(asinh) MSL_REAL1(acosh) MSL_REAL1(atanh) MSL_REAL1(sinpi)  \
  MSL_REAL1(cospi) MSL_REAL1(tanpi) MSL_REAL1(floor) MSL_REAL1(ceil) MSL_REAL1(trunc) MSL_REAL1(round) MSL_REAL1(rint) \
  MSL_REAL1(fract) MSL_REAL1(fabs) MSL_REAL1(sign) MSL_REAL1(saturate) MSL_REAL2(pow) MSL_REAL2(powr) MSL_REAL2(atan2) \
  MSL_REAL2(fmod) MSL_REAL2(copysign) MSL_REAL2(fmax) MSL_REAL2(fmin) MSL_REAL2(fdim) MSL_REAL2(step)                  \
  MSL_REAL2(divide)                                                                                                    \
  template <class T, if_real<T> = 0>                                                                                   \
  T fma(T, also<T>, also<T>);
// clang-format on
MSL_REALS
namespace precise {
MSL_REALS
}
namespace fast {
MSL_REALS
}
template <class T, if_real<T> = 0>
T ldexp(T, int);
template <class T>
T abs(T);
template <class T>
T min(T, T);
template <class T>
T max(T, T);
template <class T>
T min3(T, T, T);
template <class T>
T max3(T, T, T);
template <class T>
T median3(T, T, T);
template <class T>
T clamp(T, also<T>, also<T>);
template <class T, if_real<T> = 0>
T mix(T, T, also<T>);
template <class T, class B>
T select(T, T, B);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
bool isnan(half);
bool isinf(half);
bool isfinite(half);
bool isnan(bfloat);
bool isinf(bfloat);
template <class T, enable_if_t<shape<T>::n != 1, int> = 0>
vec<int, shape<T>::n> isnan(T);
template <class T>
bool all(T);
template <class T>
bool any(T);
template <class T>
typename shape<T>::element dot(T, T);
template <class T>
typename shape<T>::element length(T);
template <class T>
typename shape<T>::element length_squared(T);
template <class T>
T popcount(T);
template <class T>
T clz(T);
template <class T>
T ctz(T);
template <class T>
T mulhi(T, T);
template <class T>
T reverse_bits(T);
template <class T>
T rotate(T, also<T>);
template <class T>
T addsat(T, T);
template <class T>
T subsat(T, T);
template <class T>
T extract_bits(T, uint, uint);
template <class T>
T insert_bits(T, T, uint, uint);

// ---- threads
enum class mem_flags : int {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_device_and_threadgroup = 3
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order { memory_order_relaxed };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define MSL_SIMD1(name)              \
  template <class T, if_simd<T> = 0> \
  T name(T);
#define MSL_SIMD2(name)              \
  template <class T, if_simd<T> = 0> \
  T name(T, ushort);
#define MSL_SIMD_FILL(name)          \
  template <class T, if_simd<T> = 0> \
  T name(T, T, ushort);              \
  template <class T, if_simd<T> = 0> \
  T name(T, T, ushort, ushort);
#define MSL_BOTH(M, name) M(simd_##name) M(quad_##name)
MSL_BOTH(MSL_SIMD1, sum)
MSL_BOTH(MSL_SIMD1, product)
MSL_BOTH(MSL_SIMD1, min)
MSL_BOTH(MSL_SIMD1, max)
MSL_BOTH(MSL_SIMD1, or)
MSL_BOTH(MSL_SIMD1, and)
MSL_BOTH(MSL_SIMD1, xor)
MSL_BOTH(MSL_SIMD1, broadcast_first)
MSL_SIMD1(simd_prefix_exclusive_sum)
MSL_SIMD1(simd_prefix_inclusive_sum)
MSL_SIMD1(simd_prefix_exclusive_product)
MSL_SIMD1(simd_prefix_inclusive_product)
MSL_BOTH(MSL_SIMD2, shuffle)
MSL_BOTH(MSL_SIMD2, shuffle_up)
MSL_BOTH(MSL_SIMD2, shuffle_down)
MSL_BOTH(MSL_SIMD2, shuffle_xor)
MSL_BOTH(MSL_SIMD2, shuffle_rotate_up)
MSL_BOTH(MSL_SIMD2, shuffle_rotate_down)
MSL_BOTH(MSL_SIMD2, broadcast)
MSL_BOTH(MSL_SIMD_FILL, shuffle_and_fill_up)
MSL_BOTH(MSL_SIMD_FILL, shuffle_and_fill_down)
enum class simd_vote : ulong {};  // simd_vote::vote_t arrives as ulong
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_all(bool);
bool simd_any(bool);
bool simd_is_first();
bool quad_all(bool);
bool quad_any(bool);

// ---- atomics: on device and threadgroup memory only; float on device only, with addition
template <class T>
struct _atomic {
  T value;
};
template <class T>
using atomic = _atomic<T>;
using atomic_uint = _atomic<uint>;
using atomic_int = _atomic<int>;
using atomic_float = _atomic<float>;
using atomic_bool = _atomic<bool>;
template <class T>
using if_32 = enable_if_t<is_same_v<T, int> || is_same_v<T, uint>, int>;
#define MSL_ATOMIC(name, space, condition) \
  template <class T, condition = 0>        \
  T atomic_##name##_explicit(volatile space _atomic<T>*, also<T>, memory_order);
#define MSL_ATOMICS(name) MSL_ATOMIC(name, device, if_32<T>) MSL_ATOMIC(name, threadgroup, if_32<T>)
MSL_ATOMICS(fetch_max)
MSL_ATOMICS(fetch_min)
MSL_ATOMICS(fetch_or)
MSL_ATOMICS(fetch_and)
MSL_ATOMICS(fetch_xor)
template <class T>
constexpr bool is_addable = is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float>;
template <class T>
using if_addable = enable_if_t<is_addable<T>, int>;
MSL_ATOMIC(fetch_add, device, if_addable<T>)
MSL_ATOMIC(fetch_add, threadgroup, if_32<T>)
MSL_ATOMIC(fetch_sub, device, if_addable<T>)
MSL_ATOMIC(fetch_sub, threadgroup, if_32<T>)
template <class T>
T atomic_exchange_explicit(volatile device _atomic<T>*, also<T>, memory_order);
template <class T>
T atomic_exchange_explicit(volatile threadgroup _atomic<T>*, also<T>, memory_order);
template <class T>
void atomic_store_explicit(volatile device _atomic<T>*, also<T>, memory_order);
template <class T>
void atomic_store_explicit(volatile threadgroup _atomic<T>*, also<T>, memory_order);
template <class T>
T atomic_load_explicit(const volatile device _atomic<T>*, memory_order);
template <class T>
T atomic_load_explicit(const volatile threadgroup _atomic<T>*, memory_order);
template <class T>
bool atomic_compare_exchange_weak_explicit(volatile device _atomic<T>*, thread T*, also<T>, memory_order, memory_order);
template <class T>
bool atomic_compare_exchange_weak_explicit(volatile threadgroup _atomic<T>*, thread T*, also<T>, memory_order,
                                           memory_order);

// ---- matrices
template <class T, int Rows = 8, int Cols = 8>
struct simdgroup_matrix {
  vec<T, 2> elements;
  thread vec<T, 2>& thread_elements() thread;
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;
template <class M, class T>
M make_matrix(T diagonal);  // what simdgroup_matrix<...>(diagonal) arrives as
template <class T, int Rows, int Cols>
simdgroup_matrix<T, Rows, Cols> make_filled_simdgroup_matrix(T);
template <class T, int Rows, int Cols>
simdgroup_matrix<T, Rows, Cols> make_diagonal_simdgroup_matrix(T);
#define MSL_MATRIX(space)                                                                                        \
  template <class T>                                                                                             \
  void simdgroup_load(thread simdgroup_matrix<T>&, const space T*, ulong = 8, ulong2 = ulong2(0), bool = false); \
  template <class T>                                                                                             \
  void simdgroup_store(const thread simdgroup_matrix<T>&, space T*, ulong = 8, ulong2 = ulong2(0), bool = false);
MSL_MATRIX(device)
MSL_MATRIX(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D>&, const thread simdgroup_matrix<A>&,
                                   const thread simdgroup_matrix<B>&, const thread simdgroup_matrix<C>&);
template <class D, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<D>&, const thread simdgroup_matrix<A>&,
                        const thread simdgroup_matrix<B>&);

struct os_log {
  os_log(constant char*, constant char*) {}
};

}  // namespace metal

using metal::as_type;
template <class T>
constexpr bool msl_is_defined(const constant T&) {
  return true;
}
#define is_function_constant_defined(name) msl_is_defined(name)
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LN2_F 0.693147180559945309417f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
