// Vectors with all swizzles of two to four components, packed vectors, operators.
// A vector moves as one load or store of its whole width, so the checker and the counter see the access that a GPU
// makes.
#pragma once
#include "types.h"

namespace metal {

template <class T, int N>
struct vec;
template <class T, int N>
struct packed_vec;

template <size_t Bytes>
struct Word;
template <>
struct Word<2> {
  typedef uint16_t type;
};
template <>
struct Word<4> {
  typedef uint32_t type;
};
template <>
struct Word<8> {
  typedef uint64_t type;
};
template <>
struct Word<16> {
  typedef uint32_t type __attribute__((vector_size(16)));
};

// A view of some components of a vector that starts where the view does.
template <class T, int N, int... I>
struct swizzle {
  T d[N];
  static constexpr int index[] = {I...};
  constexpr operator vec<T, (int)sizeof...(I)>() const { return vec<T, (int)sizeof...(I)>(d[I]...); }
  constexpr T operator[](int i) const { return d[index[i]]; }
  constexpr T& operator[](int i) { return d[index[i]]; }
  swizzle& operator=(const vec<T, (int)sizeof...(I)>& v) {
    for (int i = 0; i < (int)sizeof...(I); ++i) d[index[i]] = v.d[i];
    return *this;
  }
  swizzle& operator=(const swizzle& other) {
    vec<T, (int)sizeof...(I)> v = other;
    return *this = v;
  }
};

// Element type and width of anything that behaves as a vector.
template <class V>
struct shape {
  static constexpr bool vector = false;
  static constexpr int n = 1;
  typedef V element;
};
template <class T, int N>
struct vector_shape {
  static constexpr bool vector = true;
  static constexpr int n = N;
  typedef T element;
};
template <class T, int N>
struct shape<vec<T, N>> : vector_shape<T, N> {};
template <class T, int N>
struct shape<packed_vec<T, N>> : vector_shape<T, N> {};
template <class T, int N, int... I>
struct shape<swizzle<T, N, I...>> : vector_shape<T, sizeof...(I)> {};
template <class V>
constexpr bool is_vec = shape<V>::vector;
template <class V>
using element = typename shape<V>::element;
template <class V>
using as_vec = vec<element<V>, shape<V>::n>;

// Swizzle members of 2, 3 and 4 components: each level appends a component to the name and its index to the list (a
// macro cannot call itself, so each level has its own name).
#define MSL_D2(a, ...)                \
  swizzle<T, 2, __VA_ARGS__, 0> a##x; \
  swizzle<T, 2, __VA_ARGS__, 1> a##y;
#define MSL_C2(a, ...)                \
  swizzle<T, 2, __VA_ARGS__, 0> a##x; \
  MSL_D2(a##x, __VA_ARGS__, 0)        \
  swizzle<T, 2, __VA_ARGS__, 1> a##y; \
  MSL_D2(a##y, __VA_ARGS__, 1)
#define MSL_B2(a, ...)                \
  swizzle<T, 2, __VA_ARGS__, 0> a##x; \
  MSL_C2(a##x, __VA_ARGS__, 0)        \
  swizzle<T, 2, __VA_ARGS__, 1> a##y; \
  MSL_C2(a##y, __VA_ARGS__, 1)
#define MSL_SWIZZLES2 MSL_B2(x, 0) MSL_B2(y, 1)
#define MSL_D3(a, ...)                \
  swizzle<T, 3, __VA_ARGS__, 0> a##x; \
  swizzle<T, 3, __VA_ARGS__, 1> a##y; \
  swizzle<T, 3, __VA_ARGS__, 2> a##z;
#define MSL_C3(a, ...)                \
  swizzle<T, 3, __VA_ARGS__, 0> a##x; \
  MSL_D3(a##x, __VA_ARGS__, 0)        \
  swizzle<T, 3, __VA_ARGS__, 1> a##y; \
  MSL_D3(a##y, __VA_ARGS__, 1)        \
  swizzle<T, 3, __VA_ARGS__, 2> a##z; \
  MSL_D3(a##z, __VA_ARGS__, 2)
#define MSL_B3(a, ...)                \
  swizzle<T, 3, __VA_ARGS__, 0> a##x; \
  MSL_C3(a##x, __VA_ARGS__, 0)        \
  swizzle<T, 3, __VA_ARGS__, 1> a##y; \
  MSL_C3(a##y, __VA_ARGS__, 1)        \
  swizzle<T, 3, __VA_ARGS__, 2> a##z; \
  MSL_C3(a##z, __VA_ARGS__, 2)
#define MSL_SWIZZLES3 MSL_B3(x, 0) MSL_B3(y, 1) MSL_B3(z, 2)
#define MSL_D4(a, ...)                \
  swizzle<T, 4, __VA_ARGS__, 0> a##x; \
  swizzle<T, 4, __VA_ARGS__, 1> a##y; \
  swizzle<T, 4, __VA_ARGS__, 2> a##z; \
  swizzle<T, 4, __VA_ARGS__, 3> a##w;
#define MSL_C4(a, ...)                \
  swizzle<T, 4, __VA_ARGS__, 0> a##x; \
  MSL_D4(a##x, __VA_ARGS__, 0)        \
  swizzle<T, 4, __VA_ARGS__, 1> a##y; \
  MSL_D4(a##y, __VA_ARGS__, 1)        \
  swizzle<T, 4, __VA_ARGS__, 2> a##z; \
  MSL_D4(a##z, __VA_ARGS__, 2)        \
  swizzle<T, 4, __VA_ARGS__, 3> a##w; \
  MSL_D4(a##w, __VA_ARGS__, 3)
#define MSL_B4(a, ...)                \
  swizzle<T, 4, __VA_ARGS__, 0> a##x; \
  MSL_C4(a##x, __VA_ARGS__, 0)        \
  swizzle<T, 4, __VA_ARGS__, 1> a##y; \
  MSL_C4(a##y, __VA_ARGS__, 1)        \
  swizzle<T, 4, __VA_ARGS__, 2> a##z; \
  MSL_C4(a##z, __VA_ARGS__, 2)        \
  swizzle<T, 4, __VA_ARGS__, 3> a##w; \
  MSL_C4(a##w, __VA_ARGS__, 3)
#define MSL_SWIZZLES4 MSL_B4(x, 0) MSL_B4(y, 1) MSL_B4(z, 2) MSL_B4(w, 3)

// Members common to all widths; F is the word that moves the whole vector, or its first two components of three.
#define MSL_VECTOR(N)                                                                                         \
  constexpr T& operator[](int i) { return d[i]; }                                                             \
  constexpr const T& operator[](int i) const { return d[i]; }                                                 \
  vec() = default;                                                                                            \
  constexpr vec(const vec& o) : d{} { copy(o); }                                                              \
  constexpr vec& operator=(const vec& o) {                                                                    \
    copy(o);                                                                                                  \
    return *this;                                                                                             \
  }                                                                                                           \
  constexpr void copy(const vec& o) {                                                                         \
    if (__builtin_is_constant_evaluated()) {                                                                  \
      for (int i = 0; i < N; ++i) d[i] = o.d[i];                                                              \
    } else {                                                                                                  \
      for (int i = 0; i < words; ++i) word[i] = o.word[i];                                                    \
      if constexpr (N == 3) d[2] = o.d[2];                                                                    \
    }                                                                                                         \
  }                                                                                                           \
  template <class U, std::enable_if_t<!is_vec<U> && std::is_constructible<T, U>::value, int> = 0>             \
  constexpr vec(U s) : d{} {                                                                                  \
    for (int i = 0; i < N; ++i) d[i] = T(s);                                                                  \
  }                                                                                                           \
  template <class U, std::enable_if_t<!std::is_same<U, T>::value, int> = 0>                                   \
  explicit constexpr vec(vec<U, N> o) : d{} {                                                                 \
    for (int i = 0; i < N; ++i) d[i] = T(o.d[i]);                                                             \
  }                                                                                                           \
  template <class A, std::enable_if_t<is_vec<A> && shape<A>::n == N && !std::is_same<element<A>, T>::value && \
                                          !std::is_same<A, as_vec<A>>::value,                                 \
                                      long> = 0>                                                              \
  explicit constexpr vec(const A& o) : vec(as_vec<A>(o)) {}                                                   \
  constexpr vec(const packed_vec<T, N>& o) : d{} {                                                            \
    for (int i = 0; i < N; ++i) d[i] = o.d[i];                                                                \
  }                                                                                                           \
  template <class A, class B, class... R,                                                                     \
            std::enable_if_t<shape<A>::n + shape<B>::n + (0 + ... + shape<R>::n) == N, int> = 0>              \
  constexpr vec(const A& a, const B& b, const R&... r) : d{} {                                                \
    int k = 0;                                                                                                \
    put(k, a), put(k, b), (put(k, r), ...);                                                                   \
  }                                                                                                           \
  template <class A>                                                                                          \
  constexpr void put(int& k, const A& a) {                                                                    \
    if constexpr (is_vec<A>) {                                                                                \
      as_vec<A> v = a;                                                                                        \
      for (int i = 0; i < shape<A>::n; ++i) d[k++] = T(v.d[i]);                                               \
    } else {                                                                                                  \
      d[k++] = T(a);                                                                                          \
    }                                                                                                         \
  }

template <class T, int N>
constexpr int word_bytes = N == 3               ? 2 * sizeof(T)
                           : N * sizeof(T) < 16 ? N * sizeof(T)
                                                : 16;
#define MSL_STORAGE(N)                                                        \
  static constexpr int words = N == 3 ? 1 : N * sizeof(T) / word_bytes<T, N>; \
  typedef typename Word<word_bytes<T, N>>::type word_type;

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  MSL_STORAGE(2)
  union {
    T d[2];
    word_type word[words];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    MSL_SWIZZLES2
  };
  MSL_VECTOR(2)
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  MSL_STORAGE(3)
  union {
    T d[3];
    word_type word[words];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    MSL_SWIZZLES3
  };
  MSL_VECTOR(3)
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  MSL_STORAGE(4)
  union {
    T d[4];
    word_type word[words];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    MSL_SWIZZLES4
  };
  MSL_VECTOR(4)
};

template <class T, int N>
struct packed_vec {
  T d[N];
  packed_vec() = default;
  constexpr packed_vec(const vec<T, N>& v) : d{} {
    for (int i = 0; i < N; ++i) d[i] = v.d[i];
  }
  template <class... A, std::enable_if_t<sizeof...(A) == N, int> = 0>
  constexpr packed_vec(A... a) : d{T(a)...} {}
  constexpr T& operator[](int i) { return d[i]; }
  constexpr const T& operator[](int i) const { return d[i]; }
};

// An operator takes vectors of one type, or a vector and a scalar.
template <class A, class B>
using common_vec = std::conditional_t<is_vec<A>, as_vec<A>, as_vec<B>>;
template <class A, class B>
constexpr bool joins =
    is_vec<A> ? (is_vec<B> ? shape<A>::n == shape<B>::n && std::is_same<element<A>, element<B>>::value
                           : std::is_convertible<B, element<A>>::value || is_arithmetic_v<B>)
              : is_vec<B> && (std::is_convertible<A, element<B>>::value || is_arithmetic_v<A>);

#define MSL_BINARY(op)                                                                                    \
  template <class A, class B, std::enable_if_t<joins<A, B>, int> = 0>                                     \
  constexpr common_vec<A, B> operator op(const A& a, const B& b) {                                        \
    common_vec<A, B> u = a, v = b, r{};                                                                   \
    for (int i = 0; i < shape<common_vec<A, B>>::n; ++i) r.d[i] = element<decltype(r)>(u.d[i] op v.d[i]); \
    return r;                                                                                             \
  }                                                                                                       \
  template <class A, class B, std::enable_if_t<is_vec<A> && joins<A, B>, int> = 0>                        \
  constexpr A& operator op## = (A & a, const B& b) {                                                      \
    common_vec<A, B> u = a;                                                                               \
    a = u op b;                                                                                           \
    return a;                                                                                             \
  }
MSL_BINARY(+)
MSL_BINARY(-)
MSL_BINARY(*)
MSL_BINARY(/)
MSL_BINARY(%)
MSL_BINARY(&)
MSL_BINARY(|)
MSL_BINARY(^)
MSL_BINARY(<<)
MSL_BINARY(>>)
#undef MSL_BINARY
#define MSL_COMPARE(op)                                                                 \
  template <class A, class B, std::enable_if_t<joins<A, B>, int> = 0>                   \
  constexpr vec<bool, shape<common_vec<A, B>>::n> operator op(const A& a, const B& b) { \
    common_vec<A, B> u = a, v = b;                                                      \
    vec<bool, shape<common_vec<A, B>>::n> r{};                                          \
    for (int i = 0; i < shape<common_vec<A, B>>::n; ++i) r.d[i] = u.d[i] op v.d[i];     \
    return r;                                                                           \
  }
MSL_COMPARE(<)
MSL_COMPARE(>)
MSL_COMPARE(<=)
MSL_COMPARE(>=)
MSL_COMPARE(==)
MSL_COMPARE(!=)
MSL_COMPARE(&&)
MSL_COMPARE(||)
#undef MSL_COMPARE
#define MSL_UNARY(op)                                                     \
  template <class A, std::enable_if_t<is_vec<A>, int> = 0>                \
  constexpr as_vec<A> operator op(const A& a) {                           \
    as_vec<A> v = a, r{};                                                 \
    for (int i = 0; i < shape<A>::n; ++i) r.d[i] = element<A>(op v.d[i]); \
    return r;                                                             \
  }
MSL_UNARY(-)
MSL_UNARY(~)
MSL_UNARY(!)
#undef MSL_UNARY
template <class A, std::enable_if_t<is_vec<A>, int> = 0>
constexpr A& operator++(A& a) {
  return a = a + element<A>(1);
}
template <class A, std::enable_if_t<is_vec<A>, int> = 0>
constexpr A& operator--(A& a) {
  return a = a - element<A>(1);
}

#define MSL_NAMES(T)                      \
  using T##2 = vec<T, 2>;                 \
  using T##3 = vec<T, 3>;                 \
  using T##4 = vec<T, 4>;                 \
  using packed_##T##2 = packed_vec<T, 2>; \
  using packed_##T##3 = packed_vec<T, 3>; \
  using packed_##T##4 = packed_vec<T, 4>;
MSL_NAMES(bool)
MSL_NAMES(char)
MSL_NAMES(uchar)
MSL_NAMES(short)
MSL_NAMES(ushort)
MSL_NAMES(int)
MSL_NAMES(uint)
MSL_NAMES(long)
MSL_NAMES(ulong)
MSL_NAMES(half)
MSL_NAMES(bfloat)
MSL_NAMES(float)
#undef MSL_NAMES

}  // namespace metal
