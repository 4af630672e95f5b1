// The machine's services to a kernel (machine.cpp), and how a kernel's arguments reach it.
#pragma once
#include "abi.h"

extern "C" {
const msl::Thread* msl_self();
const msl::Launch* msl_launch_state();
void msl_threadgroup_barrier(int flags, const void* site);
void msl_simdgroup_barrier(int flags, const void* site);
// Deposits up to 64 bytes, waits for the simdgroup, returns its deposits (64 bytes a lane) and the mask of active
// lanes.
const unsigned char* msl_exchange(const void* value, int bytes, int operation, const void* site, uint32_t* mask);
// Memory of a threadgroup variable; grain: bytes of its scalar type.
void* msl_threadgroup_slot(int id, size_t bytes, size_t align, size_t grain);
void msl_atomic_access(const volatile void* p, int bytes, bool write, const void* site);
void msl_matrix_multiply();
[[noreturn]] void msl_misuse(const char* what, const void* site);
// Function constants: each registers itself at load; the machine fills them, then runs the initialisers that depend on
// them.
void msl_register_constant(void* where, int bytes, int index);
void msl_register_derived(void (*initialise)());
int msl_constant_defined(const void* where);
}

namespace msl {

struct RegisterConstant {
  RegisterConstant(void* where, int bytes, int index) { msl_register_constant(where, bytes, index); }
};
struct RegisterDerived {
  RegisterDerived(void (*initialise)()) { msl_register_derived(initialise); }
};
template <class T>
int is_defined(const T& constant) {
  return msl_constant_defined(&constant);
}

}  // namespace msl

#define MSL_SITE __builtin_return_address(0)
// Calls of synchronising functions keep their place: those of two branches do not become one.
#ifdef __clang__
#define MSL_NOINLINE __attribute__((noinline, nomerge, convergent))
#define MSL_UNCHECKED __attribute__((noinline, nomerge, convergent, disable_sanitizer_instrumentation))
#else
#define MSL_NOINLINE __attribute__((noinline))
#define MSL_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
#endif
