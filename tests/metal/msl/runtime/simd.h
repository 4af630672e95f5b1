// <metal_compute>, <metal_simdgroup>, <metal_quadgroup>: barriers, reductions, scans, shuffles, votes over 32 lanes.
// Every operation is a meeting of the simdgroup's lanes; it orders no memory.
#pragma once
#include "hooks.h"
#include "math.h"

namespace metal {

enum class mem_flags : int {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_device_and_threadgroup = 3
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

MSL_NOINLINE inline void threadgroup_barrier(mem_flags flags) { msl_threadgroup_barrier((int)flags, MSL_SITE); }
MSL_NOINLINE inline void threadgroup_barrier(mem_flags flags, memory_order, thread_scope = thread_scope_threadgroup) {
  msl_threadgroup_barrier((int)flags, MSL_SITE);
}
MSL_NOINLINE inline void simdgroup_barrier(mem_flags flags) { msl_simdgroup_barrier((int)flags, MSL_SITE); }

class simd_vote {
 public:
  using vote_t = uint64_t;
  explicit constexpr simd_vote(vote_t v = 0) : votes(v) {}
  explicit constexpr operator vote_t() const { return votes; }
  constexpr bool all() const { return votes == 0xffffffffu; }
  constexpr bool any() const { return votes != 0; }

 private:
  vote_t votes;
};
class quad_vote {
 public:
  using vote_t = uint64_t;
  explicit constexpr quad_vote(vote_t v = 0) : votes(v) {}
  explicit constexpr operator vote_t() const { return votes; }
  constexpr bool all() const { return votes == 0xfu; }
  constexpr bool any() const { return votes != 0; }

 private:
  vote_t votes;
};

}  // namespace metal

namespace msl {

enum Operation {
  reduce = 1,  // + index of the operation, so that two kinds never meet unnoticed
  scan = 20,
  shuffle = 40,
  vote = 60,
  quad = 70,
  matrix = 90
};

inline int lane() { return (int)msl_self()->lane; }

// The deposits of a simdgroup. An inactive lane's value is undefined on a GPU: asking for it is an error.
template <class T>
struct Table {
  const unsigned char* rows;
  uint32_t mask;
  const void* site;
  bool has(int i) const { return i >= 0 && i < simd_width && (mask >> i & 1); }
  T operator[](int i) const {
    if (!has(i)) msl_misuse("reads a lane that is inactive or out of range", site);
    return raw(i);
  }
  T raw(int i) const {
    T v;
    __builtin_memcpy((void*)&v, rows + 64 * i, sizeof(T));
    return v;
  }
};
template <class T>
MSL_UNCHECKED Table<T> exchange(const T& value, int operation, const void* site) {
  static_assert(sizeof(T) <= 64, "a simd operation moves at most 64 bytes a lane");
  Table<T> t;
  t.site = site;
  t.rows = msl_exchange((const void*)&value, sizeof(T), operation, site, &t.mask);
  return t;
}

// Values of the active lanes from first to last, combined as a tree.
template <class T, class F>
T combine(const Table<T>& t, int first, int count, F f) {
  T v[simd_width];
  int n = 0;
  for (int i = first; i < first + count; ++i)
    if (t.has(i)) v[n++] = t.raw(i);
  while (n > 1) {
    int half_n = (n + 1) / 2;
    for (int i = 0; i + half_n < n; ++i) v[i] = f(v[i], v[i + half_n]);
    n = half_n;
  }
  return v[0];
}
template <class T, class F>
T prefix(const Table<T>& t, int end, T identity, F f) {
  T a = identity;
  for (int i = 0; i < end; ++i)
    if (t.has(i)) a = f(a, t.raw(i));
  return a;
}
// What a GPU leaves undefined shows up as a pattern that no test expects.
template <class T>
T undefined() {
  T v;
  __builtin_memset((void*)&v, 0xff, sizeof(T));
  return v;
}

}  // namespace msl

namespace metal {

#define MSL_REDUCTION(name, id, expr)                                                                           \
  template <class T>                                                                                            \
  MSL_UNCHECKED T simd_##name(T v) {                                                                            \
    return msl::combine(msl::exchange(v, msl::reduce + id, MSL_SITE), 0, 32, [](T a, T b) { return T(expr); }); \
  }                                                                                                             \
  template <class T>                                                                                            \
  MSL_UNCHECKED T quad_##name(T v) {                                                                            \
    auto t = msl::exchange(v, msl::quad + id, MSL_SITE);                                                        \
    return msl::combine(t, msl::lane() & ~3, 4, [](T a, T b) { return T(expr); });                              \
  }
MSL_REDUCTION(sum, 0, a + b)
MSL_REDUCTION(product, 1, a* b)
MSL_REDUCTION(max, 2, metal::max(a, b))
MSL_REDUCTION(min, 3, metal::min(a, b))
MSL_REDUCTION(or, 4, a | b)
MSL_REDUCTION(and, 5, a& b)
MSL_REDUCTION(xor, 6, a ^ b)
#undef MSL_REDUCTION

#define MSL_SCAN(name, id, identity, expr)                                                 \
  template <class T>                                                                       \
  MSL_UNCHECKED T simd_prefix_exclusive_##name(T v) {                                      \
    auto t = msl::exchange(v, msl::scan + id, MSL_SITE);                                   \
    return msl::prefix(t, msl::lane(), T(identity), [](T a, T b) { return T(expr); });     \
  }                                                                                        \
  template <class T>                                                                       \
  MSL_UNCHECKED T simd_prefix_inclusive_##name(T v) {                                      \
    auto t = msl::exchange(v, msl::scan + id + 1, MSL_SITE);                               \
    return msl::prefix(t, msl::lane() + 1, T(identity), [](T a, T b) { return T(expr); }); \
  }
MSL_SCAN(sum, 0, 0, a + b)
MSL_SCAN(product, 2, 1, a* b)
#undef MSL_SCAN

// The lane that each shuffle reads is `from`; `l` is the reading lane, `k` the argument.
#define MSL_SHUFFLE(name, id, from)          \
  template <class T>                         \
  MSL_UNCHECKED T name(T v, ushort k) {      \
    auto t = msl::exchange(v, id, MSL_SITE); \
    int l = msl::lane();                     \
    (void)l;                                 \
    return t[from];                          \
  }
MSL_SHUFFLE(simd_shuffle, msl::shuffle, k)
MSL_SHUFFLE(simd_broadcast, msl::shuffle + 1, k)
MSL_SHUFFLE(simd_shuffle_xor, msl::shuffle + 2, l ^ k)
MSL_SHUFFLE(simd_shuffle_rotate_up, msl::shuffle + 3, (l - k) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_down, msl::shuffle + 4, (l + k) & 31)
MSL_SHUFFLE(quad_shuffle, msl::quad + 10, (l & ~3) | (k & 3))
MSL_SHUFFLE(quad_broadcast, msl::quad + 11, (l & ~3) | (k & 3))
MSL_SHUFFLE(quad_shuffle_xor, msl::quad + 12, (l & ~3) | ((l ^ k) & 3))
MSL_SHUFFLE(quad_shuffle_rotate_up, msl::quad + 13, (l & ~3) | ((l - k) & 3))
MSL_SHUFFLE(quad_shuffle_rotate_down, msl::quad + 14, (l & ~3) | ((l + k) & 3))
#undef MSL_SHUFFLE
// Up and down leave the lanes without a source undefined.
#define MSL_SHIFT(name, id, width, step)                                                          \
  template <class T>                                                                              \
  MSL_UNCHECKED T name(T v, ushort k) {                                                           \
    auto t = msl::exchange(v, id, MSL_SITE);                                                      \
    int l = msl::lane(), i = l step k;                                                            \
    return (i & ~(width - 1)) == (l & ~(width - 1)) && t.has(i) ? t.raw(i) : msl::undefined<T>(); \
  }
MSL_SHIFT(simd_shuffle_up, msl::shuffle + 5, 32, -)
MSL_SHIFT(simd_shuffle_down, msl::shuffle + 6, 32, +)
MSL_SHIFT(quad_shuffle_up, msl::quad + 15, 4, -)
MSL_SHIFT(quad_shuffle_down, msl::quad + 16, 4, +)
#undef MSL_SHIFT
// The fill variants shift within segments of `modulo` lanes and take the vacated lanes from the other end of the
// filling.
template <class T>
struct Filled {
  T v, fill;
};
#define MSL_FILL(name, id, width, step)                                           \
  template <class T>                                                              \
  MSL_UNCHECKED T name(T v, T fill, ushort k, ushort modulo = width) {            \
    auto t = msl::exchange(Filled<T>{v, fill}, id, MSL_SITE);                     \
    int l = msl::lane(), base = l & ~(modulo - 1), i = (l & (modulo - 1)) step k; \
    if (i < 0) return t[base + i + modulo].fill;                                  \
    if (i >= modulo) return t[base + i - modulo].fill;                            \
    return t[base + i].v;                                                         \
  }
MSL_FILL(simd_shuffle_and_fill_up, msl::shuffle + 7, 32, -)
MSL_FILL(simd_shuffle_and_fill_down, msl::shuffle + 8, 32, +)
MSL_FILL(quad_shuffle_and_fill_up, msl::quad + 17, 4, -)
MSL_FILL(quad_shuffle_and_fill_down, msl::quad + 18, 4, +)
#undef MSL_FILL

template <class T>
MSL_UNCHECKED T simd_broadcast_first(T v) {
  auto t = msl::exchange(v, msl::shuffle + 9, MSL_SITE);
  return t.raw(__builtin_ctz(t.mask));
}
template <class T>
MSL_UNCHECKED T quad_broadcast_first(T v) {
  auto t = msl::exchange(v, msl::quad + 19, MSL_SITE);
  int base = msl::lane() & ~3;
  return t.raw(base + __builtin_ctz(t.mask >> base));
}
inline uint32_t votes(const msl::Table<bool>& t) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= uint32_t(t.has(i) && t.raw(i)) << i;
  return r;
}
MSL_UNCHECKED inline simd_vote simd_ballot(bool e) { return simd_vote(votes(msl::exchange(e, msl::vote, MSL_SITE))); }
MSL_UNCHECKED inline bool simd_all(bool e) {
  auto t = msl::exchange(e, msl::vote + 1, MSL_SITE);
  return votes(t) == t.mask;
}
MSL_UNCHECKED inline bool simd_any(bool e) { return votes(msl::exchange(e, msl::vote + 2, MSL_SITE)) != 0; }
MSL_UNCHECKED inline bool simd_is_first() {
  auto t = msl::exchange(true, msl::vote + 3, MSL_SITE);
  return msl::lane() == __builtin_ctz(t.mask);
}
MSL_UNCHECKED inline simd_vote simd_active_threads_mask() {
  return simd_vote(msl::exchange(true, msl::vote + 4, MSL_SITE).mask);
}
MSL_UNCHECKED inline quad_vote quad_ballot(bool e) {
  return quad_vote(votes(msl::exchange(e, msl::vote + 5, MSL_SITE)) >> (msl::lane() & ~3) & 0xf);
}
MSL_UNCHECKED inline bool quad_all(bool e) {
  auto t = msl::exchange(e, msl::vote + 6, MSL_SITE);
  int base = msl::lane() & ~3;
  return (votes(t) >> base & 0xf) == (t.mask >> base & 0xf);
}
MSL_UNCHECKED inline bool quad_any(bool e) {
  return (votes(msl::exchange(e, msl::vote + 7, MSL_SITE)) >> (msl::lane() & ~3) & 0xf) != 0;
}

}  // namespace metal
