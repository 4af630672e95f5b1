// <metal_math>, <metal_integer>, <metal_relational>, <metal_geometric>. Real functions compute in float and round once.
#pragma once
#include "vector.h"

namespace metal {

template <class T>
constexpr bool is_real_vec = is_vec<T> && is_real<element<T>>;
template <class T>
using if_real = std::enable_if_t<is_real<T> || is_real_vec<T>, int>;
template <class T>
using if_integer = std::enable_if_t<std::is_integral<T>::value, long>;

template <class F, class A>
inline as_vec<A> each(F f, const A& a) {
  as_vec<A> v = a, r{};
  for (int i = 0; i < shape<A>::n; ++i) r.d[i] = element<A>(f(v.d[i]));
  return r;
}
template <class F, class A, class B>
inline common_vec<A, B> each(F f, const A& a, const B& b) {
  common_vec<A, B> u = a, v = b, r{};
  for (int i = 0; i < shape<common_vec<A, B>>::n; ++i) r.d[i] = element<decltype(r)>(f(u.d[i], v.d[i]));
  return r;
}

#define MSL_REAL1(name, EXPR)                       \
  template <class T, if_real<T> = 0>                \
  inline auto name(const T& v) {                    \
    auto f = [](float x) -> float { return EXPR; }; \
    if constexpr (is_vec<T>)                        \
      return each(f, v);                            \
    else                                            \
      return T(f(v));                               \
  }                                                 \
  template <class T, if_integer<T> = 0>             \
  inline float name(T v) {                          \
    float x = (float)v;                             \
    return EXPR;                                    \
  }
#define MSL_REAL2(name, EXPR)                                                                               \
  template <class T, if_real<T> = 0>                                                                        \
  inline T name(T a, std::common_type_t<T> b) {                                                             \
    auto f = [](float x, float y) -> float { return EXPR; };                                                \
    if constexpr (is_vec<T>)                                                                                \
      return each(f, a, b);                                                                                 \
    else                                                                                                    \
      return T(f(a, b));                                                                                    \
  }                                                                                                         \
  template <class A, class B, std::enable_if_t<std::is_integral<A>::value && is_arithmetic_v<B>, long> = 0> \
  inline float name(A a, B b) {                                                                             \
    float x = (float)a, y = (float)b;                                                                       \
    return EXPR;                                                                                            \
  }
#define MSL_REAL_FUNCTIONS                                                   \
  MSL_REAL1(exp, __builtin_expf(x))                                          \
  MSL_REAL1(exp2, __builtin_exp2f(x))                                        \
  MSL_REAL1(exp10, __builtin_powf(10.f, x))                                  \
  MSL_REAL1(log, __builtin_logf(x))                                          \
  MSL_REAL1(log2, __builtin_log2f(x))                                        \
  MSL_REAL1(log10, __builtin_log10f(x))                                      \
  MSL_REAL1(sqrt, __builtin_sqrtf(x))                                        \
  MSL_REAL1(rsqrt, 1.f / __builtin_sqrtf(x))                                 \
  MSL_REAL1(sin, __builtin_sinf(x))                                          \
  MSL_REAL1(cos, __builtin_cosf(x))                                          \
  MSL_REAL1(tan, __builtin_tanf(x))                                          \
  MSL_REAL1(asin, __builtin_asinf(x))                                        \
  MSL_REAL1(acos, __builtin_acosf(x))                                        \
  MSL_REAL1(atan, __builtin_atanf(x))                                        \
  MSL_REAL1(sinh, __builtin_sinhf(x))                                        \
  MSL_REAL1(cosh, __builtin_coshf(x))                                        \
  MSL_REAL1(tanh, __builtin_tanhf(x))                                        \
  MSL_REAL1(asinh, __builtin_asinhf(x))                                      \
  MSL_REAL1(acosh, __builtin_acoshf(x))                                      \
  MSL_REAL1(atanh, __builtin_atanhf(x))                                      \
  MSL_REAL1(sinpi, (float)__builtin_sin(3.14159265358979323846 * x))         \
  MSL_REAL1(cospi, (float)__builtin_cos(3.14159265358979323846 * x))         \
  MSL_REAL1(tanpi, (float)__builtin_tan(3.14159265358979323846 * x))         \
  MSL_REAL1(floor, __builtin_floorf(x))                                      \
  MSL_REAL1(ceil, __builtin_ceilf(x))                                        \
  MSL_REAL1(trunc, __builtin_truncf(x))                                      \
  MSL_REAL1(round, __builtin_roundf(x))                                      \
  MSL_REAL1(rint, __builtin_rintf(x))                                        \
  MSL_REAL1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f)) \
  MSL_REAL1(fabs, __builtin_fabsf(x))                                        \
  MSL_REAL1(sign, (x > 0.f ? 1.f : x < 0.f ? -1.f : x))                      \
  MSL_REAL1(saturate, (x > 0.f ? x < 1.f ? x : 1.f : 0.f))                   \
  MSL_REAL2(pow, __builtin_powf(x, y))                                       \
  MSL_REAL2(powr, __builtin_powf(x, y))                                      \
  MSL_REAL2(atan2, __builtin_atan2f(x, y))                                   \
  MSL_REAL2(fmod, __builtin_fmodf(x, y))                                     \
  MSL_REAL2(copysign, __builtin_copysignf(x, y))                             \
  MSL_REAL2(fmax, __builtin_fmaxf(x, y))                                     \
  MSL_REAL2(fmin, __builtin_fminf(x, y))                                     \
  MSL_REAL2(fdim, __builtin_fdimf(x, y))                                     \
  MSL_REAL2(nextafter, __builtin_nextafterf(x, y))                           \
  MSL_REAL2(step, (y < x ? 0.f : 1.f))                                       \
  MSL_REAL2(divide, x / y)
MSL_REAL_FUNCTIONS

template <class T, if_real<T> = 0>
inline T fma(T a, std::common_type_t<T> b, std::common_type_t<T> c) {
  if constexpr (is_vec<T>) {
    T r{};
    for (int i = 0; i < shape<T>::n; ++i) r.d[i] = element<T>(__builtin_fmaf(a.d[i], b.d[i], c.d[i]));
    return r;
  } else {
    return T(__builtin_fmaf(a, b, c));
  }
}
namespace precise {
MSL_REAL_FUNCTIONS
using metal::fma;
}  // namespace precise
namespace fast {
MSL_REAL_FUNCTIONS
using metal::fma;
}  // namespace fast
#undef MSL_REAL_FUNCTIONS
#undef MSL_REAL1
#undef MSL_REAL2

// NaN loses in min and max of reals, as in IEEE minNum.
#define MSL_EXTREME(name, op)                                                                       \
  template <class T>                                                                                \
  constexpr T name(T a, T b) {                                                                      \
    if constexpr (is_vec<T>) {                                                                      \
      T r{};                                                                                        \
      for (int i = 0; i < shape<T>::n; ++i) r.d[i] = name(a.d[i], b.d[i]);                          \
      return r;                                                                                     \
    } else if constexpr (is_real<T>) {                                                              \
      return T(__builtin_f##name##f((float)a, (float)b));                                           \
    } else {                                                                                        \
      return a op b ? a : b;                                                                        \
    }                                                                                               \
  }                                                                                                 \
  template <class A, class B, std::enable_if_t<!std::is_same<A, B>::value && joins<A, B>, int> = 0> \
  constexpr common_vec<A, B> name(const A& a, const B& b) {                                         \
    return name(common_vec<A, B>(a), common_vec<A, B>(b));                                          \
  }                                                                                                 \
  template <class T>                                                                                \
  constexpr T name##3(T a, T b, T c) {                                                              \
    return name(a, name(b, c));                                                                     \
  }
MSL_EXTREME(min, <)
MSL_EXTREME(max, >)
#undef MSL_EXTREME
namespace precise {
using metal::max;
using metal::min;
}  // namespace precise
namespace fast {
using metal::max;
using metal::min;
}  // namespace fast

template <class T>
constexpr T median3(T a, T b, T c) {
  return max(min(a, b), min(max(a, b), c));
}
template <class T>
inline T abs(T a) {
  if constexpr (is_vec<T>)
    return each([](element<T> x) { return abs(x); }, a);
  else if constexpr (is_real<T>)
    return T(__builtin_fabsf((float)a));
  else
    return a < T(0) ? T(-a) : a;
}
template <class T>
inline auto absdiff(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return a > b ? U(U(a) - U(b)) : U(U(b) - U(a));
}
template <class T>
constexpr T clamp(T x, std::common_type_t<T> lo, std::common_type_t<T> hi) {
  return min(max(x, T(lo)), T(hi));
}
template <class T>
inline T mix(T a, std::common_type_t<T> b, std::common_type_t<T> t) {
  return T(a + (b - a) * t);
}
template <class T>
inline T smoothstep(T lo, std::common_type_t<T> hi, std::common_type_t<T> x) {
  T t = clamp(T((x - lo) / (hi - lo)), T(0), T(1));
  return T(t * t * (T(3) - T(2) * t));
}
template <class T, class B>
inline T select(T a, T b, B choose_b) {
  if constexpr (is_vec<B>) {
    as_vec<B> c = choose_b;
    T r{};
    for (int i = 0; i < shape<T>::n; ++i) r.d[i] = c.d[i] ? b.d[i] : a.d[i];
    return r;
  } else {
    return choose_b ? b : a;
  }
}
template <class T>
inline T modf(T x, T& whole) {
  whole = trunc(x);
  return T(x - whole);
}
template <class T>
inline T ldexp(T x, int e) {
  return T(__builtin_ldexpf((float)x, e));
}
template <class T>
inline T frexp(T x, int& e) {
  return T(__builtin_frexpf((float)x, &e));
}
template <class T>
inline int ilogb(T x) {
  return __builtin_ilogbf((float)x);
}
template <class T>
inline T sincos(T x, T& c) {
  c = cos(x);
  return sin(x);
}

#define MSL_TEST(name, EXPR)                                           \
  template <class T>                                                   \
  inline auto name(const T& v) {                                       \
    auto f = [](float x) -> bool { return EXPR; };                     \
    if constexpr (is_vec<T>) {                                         \
      as_vec<T> u = v;                                                 \
      vec<bool, shape<T>::n> r{};                                      \
      for (int i = 0; i < shape<T>::n; ++i) r.d[i] = f((float)u.d[i]); \
      return r;                                                        \
    } else {                                                           \
      return f((float)v);                                              \
    }                                                                  \
  }
MSL_TEST(isnan, __builtin_isnan(x))
MSL_TEST(isinf, __builtin_isinf(x) != 0)
MSL_TEST(isfinite, __builtin_isfinite(x))
MSL_TEST(isnormal, __builtin_isnormal(x))
MSL_TEST(signbit, __builtin_signbit(x) != 0)
#undef MSL_TEST
template <int N>
constexpr bool all(vec<bool, N> v) {
  bool r = true;
  for (int i = 0; i < N; ++i) r = r && v.d[i];
  return r;
}
template <int N>
constexpr bool any(vec<bool, N> v) {
  bool r = false;
  for (int i = 0; i < N; ++i) r = r || v.d[i];
  return r;
}
constexpr bool all(bool v) { return v; }
constexpr bool any(bool v) { return v; }

template <class A, class B, std::enable_if_t<is_vec<A> && is_vec<B> && joins<A, B>, int> = 0>
constexpr element<A> dot(const A& a, const B& b) {
  as_vec<A> u = a, v = b;
  auto s = u.d[0] * v.d[0];
  for (int i = 1; i < shape<A>::n; ++i) s += u.d[i] * v.d[i];
  return element<A>(s);
}
template <class A, std::enable_if_t<is_vec<A>, int> = 0>
inline element<A> length_squared(const A& a) {
  return dot(a, a);
}
template <class A, std::enable_if_t<is_vec<A>, int> = 0>
inline element<A> length(const A& a) {
  return sqrt(dot(a, a));
}
template <class A, class B, std::enable_if_t<is_vec<A> && joins<A, B>, int> = 0>
inline element<A> distance(const A& a, const B& b) {
  return length(a - b);
}
template <class A, std::enable_if_t<is_vec<A>, int> = 0>
inline as_vec<A> normalize(const A& a) {
  return a * rsqrt(dot(a, a));
}
template <class T>
inline vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

// Integers. A vector is treated component by component.
#define MSL_INTEGER1(name, EXPR)                                   \
  template <class T>                                               \
  constexpr T name(T v) {                                          \
    if constexpr (is_vec<T>) {                                     \
      T r{};                                                       \
      for (int i = 0; i < shape<T>::n; ++i) r.d[i] = name(v.d[i]); \
      return r;                                                    \
    } else {                                                       \
      constexpr int width = sizeof(T) * 8;                         \
      unsigned long long x = (std::make_unsigned_t<T>)v;           \
      (void)width;                                                 \
      return T(EXPR);                                              \
    }                                                              \
  }
MSL_INTEGER1(popcount, __builtin_popcountll(x))
MSL_INTEGER1(clz, x ? __builtin_clzll(x) - (64 - width) : width)
MSL_INTEGER1(ctz, x ? __builtin_ctzll(x) : width)
#undef MSL_INTEGER1
template <class T>
constexpr T reverse_bits(T v) {
  T r = 0;
  for (unsigned i = 0; i < sizeof(T) * 8; ++i) r = T(T(r << 1) | T((v >> i) & 1));
  return r;
}
template <class T>
constexpr T mulhi(T a, T b) {
  return T((__int128(a) * __int128(b)) >> (8 * sizeof(T)));
}
template <class T>
constexpr T madhi(T a, T b, T c) {
  return T(mulhi(a, b) + c);
}
template <class T>
constexpr T mad24(T a, T b, T c) {
  return T(a * b + c);
}
template <class T>
constexpr T addsat(T a, T b) {
  __int128 s = __int128(a) + b, lo = numeric_limits<T>::min(), hi = numeric_limits<T>::max();
  return T(s < lo ? lo : s > hi ? hi : s);
}
template <class T>
constexpr T subsat(T a, T b) {
  __int128 s = __int128(a) - b, lo = numeric_limits<T>::min(), hi = numeric_limits<T>::max();
  return T(s < lo ? lo : s > hi ? hi : s);
}
template <class T>
constexpr T hadd(T a, T b) {
  return T((__int128(a) + b) >> 1);
}
template <class T>
constexpr T rhadd(T a, T b) {
  return T((__int128(a) + b + 1) >> 1);
}
template <class T>
constexpr T rotate(T v, T by) {
  using U = std::make_unsigned_t<T>;
  constexpr unsigned width = sizeof(T) * 8;
  unsigned k = unsigned(by) % width;
  return T(k ? U(U(v) << k) | U(U(v) >> (width - k)) : U(v));
}
template <class T>
constexpr T extract_bits(T v, uint offset, uint bits) {
  if (bits == 0) return T(0);
  using U = std::make_unsigned_t<T>;
  unsigned spare = sizeof(T) * 8 - bits;
  U top = U(U(v) << (spare - offset));
  return std::is_signed<T>::value ? T(T(top) >> spare) : T(top >> spare);
}
template <class T>
constexpr T insert_bits(T base, T insert, uint offset, uint bits) {
  if (bits == 0) return base;
  using U = std::make_unsigned_t<T>;
  U mask = U(U(~U(0)) >> (sizeof(T) * 8 - bits)) << offset;
  return T((U(base) & U(~mask)) | ((U(insert) << offset) & mask));
}

}  // namespace metal
