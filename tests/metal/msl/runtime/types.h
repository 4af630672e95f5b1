// Scalar types. `half` is the compiler's IEEE half; `bfloat` converts to float freely and from float only when asked,
// as in MSL.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
typedef __fp16 half;  // computes in float and rounds when stored
#else
typedef _Float16 half;
#endif

struct bfloat {
  uint16_t bits;

  static constexpr uint16_t round(float f) {
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);  // NaN stays NaN
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);                  // to nearest, ties to even
  }
  template <class U>
  static constexpr bool number = std::is_arithmetic<U>::value || std::is_same<U, half>::value;

  bfloat() = default;
  template <class U, std::enable_if_t<number<U> && !std::is_same<U, int>::value, int> = 0>
  explicit constexpr bfloat(U x) : bits(round((float)x)) {}
  template <class U, std::enable_if_t<std::is_same<U, int>::value, long> = 0>
  constexpr bfloat(U x) : bits(round((float)x)) {}
  constexpr operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }
};

#define MSL_BFLOAT_OP(op)                                                                   \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op(float) b); } \
  inline bfloat& operator op## = (bfloat & a, bfloat b) { return a = a op b; }              \
  inline bfloat& operator op## = (bfloat & a, float b) { return a = bfloat((float)a op b); }
MSL_BFLOAT_OP(+)
MSL_BFLOAT_OP(-)
MSL_BFLOAT_OP(*)
MSL_BFLOAT_OP(/)
#undef MSL_BFLOAT_OP
constexpr bfloat operator-(bfloat a) { return bfloat(-(float)a); }

namespace metal {

template <class T>
constexpr bool is_real =
    std::is_same<std::remove_cv_t<T>, float>::value || std::is_same<std::remove_cv_t<T>, half>::value ||
    std::is_same<std::remove_cv_t<T>, bfloat>::value;

// <metal_type_traits>: the standard's, but for floating point.
template <class T>
struct is_floating_point : std::bool_constant<is_real<T>> {};
template <class T>
constexpr bool is_floating_point_v = is_real<T>;
template <class T>
struct is_arithmetic : std::bool_constant<is_real<T> || std::is_integral<T>::value> {};
template <class T>
constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::conjunction;
using std::conjunction_v;
using std::decay;
using std::decay_t;
using std::declval;
using std::disjunction;
using std::disjunction_v;
using std::enable_if;
using std::enable_if_t;
using std::extent;
using std::false_type;
using std::integral_constant;
using std::is_array;
using std::is_base_of;
using std::is_class;
using std::is_const;
using std::is_constructible;
using std::is_convertible;
using std::is_convertible_v;
using std::is_enum;
using std::is_integral;
using std::is_integral_v;
using std::is_pointer;
using std::is_pointer_v;
using std::is_reference;
using std::is_same;
using std::is_same_v;
using std::is_scalar;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::is_void;
using std::make_signed;
using std::make_signed_t;
using std::make_unsigned;
using std::make_unsigned_t;
using std::negation;
using std::negation_v;
using std::remove_const;
using std::remove_const_t;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_pointer;
using std::remove_pointer_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;
using std::underlying_type_t;
template <class... T>
using _disjunction = std::disjunction<T...>;
template <class T, T... I>
using integer_sequence = std::integer_sequence<T, I...>;
template <size_t... I>
using index_sequence = std::index_sequence<I...>;
template <size_t N>
using make_index_sequence = std::make_index_sequence<N>;
template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
using remove_addrspace_t = T;

template <class T>
struct numeric_limits {  // integers
  static constexpr bool is_specialized = true, is_integer = true, is_exact = true, has_infinity = false,
                        has_quiet_NaN = false, is_signed = T(-1) < T(0);
  static constexpr int digits = sizeof(T) * 8 - is_signed, radix = 2;
  static constexpr T min() { return is_signed ? T(T(1) << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T max() { return T(~min()); }
  static constexpr T lowest() { return min(); }
  static constexpr T epsilon() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
};
template <>
struct numeric_limits<bool> {
  static constexpr bool is_specialized = true, is_integer = true, is_signed = false, has_infinity = false;
  static constexpr int digits = 1;
  static constexpr bool min() { return false; }
  static constexpr bool max() { return true; }
  static constexpr bool lowest() { return false; }
};
#define MSL_LIMITS(T, MIN, MAX, EPSILON, DIGITS)                                                         \
  template <>                                                                                            \
  struct numeric_limits<T> {                                                                             \
    static constexpr bool is_specialized = true, is_integer = false, is_exact = false, is_signed = true, \
                          has_infinity = true, has_quiet_NaN = true;                                     \
    static constexpr int digits = DIGITS, radix = 2;                                                     \
    static constexpr T min() { return T(MIN); }                                                          \
    static constexpr T max() { return T(MAX); }                                                          \
    static constexpr T lowest() { return T(-(MAX)); }                                                    \
    static constexpr T epsilon() { return T(EPSILON); }                                                  \
    static constexpr T infinity() { return T(__builtin_inff()); }                                        \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }                                     \
    static constexpr T signaling_NaN() { return T(__builtin_nansf("")); }                                \
  };
MSL_LIMITS(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f, 24)
MSL_LIMITS(half, 0x1p-14f, 65504.f, 0x1p-10f, 11)
MSL_LIMITS(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f, 8)
#undef MSL_LIMITS

template <class T, size_t N>
struct array {
  T elements[N];
  constexpr T& operator[](size_t i) { return elements[i]; }
  constexpr const T& operator[](size_t i) const { return elements[i]; }
  static constexpr size_t size() { return N; }
};

template <class T>
using uniform = T;
template <class T>
constexpr T make_uniform(T v) {
  return v;
}

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  __builtin_memcpy((void*)&to, (const void*)&from, sizeof(To));
  return to;
}

}  // namespace metal
