// The compiler's ThreadSanitizer calls a function at every memory access. These are ours: they tell the observer.
#include <string.h>

#include "machine.h"

using msl::observer::access;
#define SITE __builtin_return_address(0)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define ACCESS(n)                                                                              \
  void __tsan_read##n(void* p) { access(p, n, false, false, true, SITE); }                     \
  void __tsan_write##n(void* p) { access(p, n, true, false, true, SITE); }                     \
  void __tsan_volatile_read##n(void* p) { access(p, n, false, false, true, SITE); }            \
  void __tsan_volatile_write##n(void* p) { access(p, n, true, false, true, SITE); }            \
  void __tsan_unaligned_read##n(void* p) { access(p, n, false, false, false, SITE); }          \
  void __tsan_unaligned_write##n(void* p) { access(p, n, true, false, false, SITE); }          \
  void __tsan_unaligned_volatile_read##n(void* p) { access(p, n, false, false, false, SITE); } \
  void __tsan_unaligned_volatile_write##n(void* p) { access(p, n, true, false, false, SITE); } \
  void __tsan_read_write##n(void* p) {                                                         \
    access(p, n, false, false, true, SITE);                                                    \
    access(p, n, true, false, true, SITE);                                                     \
  }                                                                                            \
  void __tsan_unaligned_read_write##n(void* p) {                                               \
    access(p, n, false, false, false, SITE);                                                   \
    access(p, n, true, false, false, SITE);                                                    \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(void* p, size_t n) { access(p, (uint32_t)n, false, false, false, SITE); }
void __tsan_write_range(void* p, size_t n) { access(p, (uint32_t)n, true, false, false, SITE); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access(from, (uint32_t)n, false, false, false, SITE);
  access(to, (uint32_t)n, true, false, false, SITE);
  return memmove(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  access(from, (uint32_t)n, false, false, false, SITE);
  access(to, (uint32_t)n, true, false, false, SITE);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  access(to, (uint32_t)n, true, false, false, SITE);
  return memset(to, value, n);
}
}
