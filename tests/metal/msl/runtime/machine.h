// Inside of the machine: what the observers (check.cpp, count.cpp) see of it.
#pragma once
#include "abi.h"

namespace msl {

enum class State { ready, at_simd_operation, at_simdgroup_barrier, at_threadgroup_barrier, exited };

// When a thread last synchronised: barriers count per kind of memory, first among the threadgroup, then within the
// simdgroup.
struct Clock {
  uint32_t group = 0, simdgroup = 0;
};

struct Fiber {
  Thread thread;
  void* stack_pointer;
  char* stack;
  State state;
  int operation;  // which barrier flags or simd operation it waits at
  const void* site;
  uint32_t
      parity;  // two tables of deposits alternate, so that a fast lane does not overwrite what a slow one still reads
  Clock device, threadgroup;
};

constexpr size_t stack_bytes = 128 << 10;

struct Slot_ {
  int id;
  char* memory;
  size_t bytes;
  uint32_t grain;
};

extern Fiber* running;          // the thread that executes, or null
extern Launch launch;           // of the buffers as the kernel sees them
extern uint32_t current_group;  // linear index of the threadgroup that runs
extern char* const arena;       // threadgroup memory
extern size_t arena_bytes;
extern Outcome* outcome;
Slot_* slot_at(const char* p);
bool in_module(const void* p);
uint32_t random_bits();
void yield_thread();
uint64_t relative(const void* site);
// Ends the launch. {0} and {1} in the message stand for the two sites.
[[noreturn]] void stop(const char* kind, const void* site, uint64_t other_site, const char* format, ...)
    __attribute__((format(printf, 4, 5)));
void check_time();

// The observer of a build; a fast build has none.
namespace observer {
void begin();
void begin_group();
void access(const volatile void* p, uint32_t bytes, bool write, bool atomic, bool aligned, const void* site);
void meet(uint32_t simdgroup);  // the lanes of a simdgroup are at one place
void barrier(bool whole_group);
void operation();
void matrix_multiply();
void end();
}  // namespace observer

}  // namespace msl
