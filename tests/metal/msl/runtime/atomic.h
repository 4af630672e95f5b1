// <metal_atomic>. Threads of a simdgroup take turns, so an operation is plain; the checker is told that it is atomic.
#pragma once
#include "simd.h"

namespace metal {

template <class T>
struct _atomic {
  T value;
};
template <class T>
using atomic = _atomic<T>;
using atomic_int = _atomic<int>;
using atomic_uint = _atomic<uint>;
using atomic_bool = _atomic<bool>;
using atomic_float = _atomic<float>;
using atomic_ulong = _atomic<ulong>;

#define MSL_ATOMIC(name, expr)                                                                     \
  template <class T, class U>                                                                      \
  MSL_UNCHECKED T atomic_##name##_explicit(volatile _atomic<T>* object, U operand, memory_order) { \
    msl_atomic_access(&object->value, sizeof(T), true, MSL_SITE);                                  \
    T old = object->value, x = T(operand);                                                         \
    (void)old;                                                                                     \
    object->value = expr;                                                                          \
    return old;                                                                                    \
  }
MSL_ATOMIC(exchange, x)
MSL_ATOMIC(fetch_add, T(old + x))
MSL_ATOMIC(fetch_sub, T(old - x))
MSL_ATOMIC(fetch_max, (old > x ? old : x))
MSL_ATOMIC(fetch_min, (old < x ? old : x))
MSL_ATOMIC(fetch_or, T(old | x))
MSL_ATOMIC(fetch_and, T(old& x))
MSL_ATOMIC(fetch_xor, T(old ^ x))
#undef MSL_ATOMIC
template <class T, class U>
MSL_UNCHECKED void atomic_max_explicit(volatile _atomic<T>* object, U operand, memory_order order) {
  atomic_fetch_max_explicit(object, operand, order);
}
template <class T, class U>
MSL_UNCHECKED void atomic_min_explicit(volatile _atomic<T>* object, U operand, memory_order order) {
  atomic_fetch_min_explicit(object, operand, order);
}
template <class T, class U>
MSL_UNCHECKED void atomic_store_explicit(volatile _atomic<T>* object, U operand, memory_order) {
  msl_atomic_access(&object->value, sizeof(T), true, MSL_SITE);
  object->value = T(operand);
}
template <class T>
MSL_UNCHECKED T atomic_load_explicit(const volatile _atomic<T>* object, memory_order) {
  msl_atomic_access(&object->value, sizeof(T), false, MSL_SITE);
  return object->value;
}
// Weak: on a GPU it may fail without a reason, so a kernel must loop. Here it fails only for one.
template <class T, class U>
MSL_UNCHECKED bool atomic_compare_exchange_weak_explicit(volatile _atomic<T>* object, T* expected, U desired,
                                                         memory_order, memory_order) {
  msl_atomic_access(&object->value, sizeof(T), true, MSL_SITE);
  T old = object->value;
  if (__builtin_memcmp(&old, expected, sizeof(T)) == 0) {
    object->value = T(desired);
    return true;
  }
  *expected = old;
  return false;
}
inline void atomic_thread_fence(mem_flags, memory_order = memory_order_relaxed, thread_scope = thread_scope_device) {}

}  // namespace metal
