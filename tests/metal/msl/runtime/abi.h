// What the kernels, the machine that runs them and the Python side agree on.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace msl {

constexpr int simd_width = 32;
constexpr int max_buffers = 31;
constexpr int max_threads = 1024;
constexpr size_t max_threadgroup_bytes = 32768;

struct U3 {
  uint32_t x, y, z;
};

struct Buffer {
  void* data;
  uint64_t size;
  uint32_t cell;       // bytes per element: the grain of race detection in this buffer
  uint32_t writable;   // 0 for `const device` and `constant`
  uint32_t undefined;  // 1: nothing has been written yet, so reading before writing is an error
  uint32_t unused;
};

struct Launch {
  Buffer buffers[max_buffers];
  uint64_t dynamic[max_buffers];  // bytes of each [[threadgroup(i)]] argument
  U3 grid, group;                 // in threads
  uint32_t schedule;              // 0: in order; odd: random order; even: random priorities of simdgroups
  uint32_t allow_uninitialised;   // reads of threadgroup memory that nobody wrote pass
  char* stacks;                   // of msl_make_stacks: one for all libraries of a process
  double seconds;                 // a launch that takes longer hangs
};

// The values behind a kernel's builtin arguments, one a thread.
struct Thread {
  U3 position_in_group, group, group_size, groups, grid, full_group_size;
  uint32_t index, lane, simdgroup, simdgroups;
};

// One buffer's counted traffic. A transaction is one 128-byte line touched by one access of one simdgroup; an access of
// all lanes to one address is scalar and counts apart.
struct Traffic {
  uint64_t read_bytes, write_bytes;  // distinct bytes of each simdgroup access, summed
  uint64_t read_transactions, write_transactions;
  uint64_t scalar_accesses, scalar_bytes;
  uint64_t group_lines;                // distinct lines of each threadgroup, summed
  uint64_t read_lines, written_lines;  // distinct lines of the whole dispatch
  uint64_t atomics;
};

struct Counts {
  Traffic buffers[max_buffers];
  uint64_t threadgroup_read_bytes, threadgroup_write_bytes;
  uint64_t threadgroup_cycles, threadgroup_ideal_cycles;  // of 32 banks of 4 bytes, with and without conflicts
  uint64_t threadgroup_atomics;
  uint64_t threadgroup_barriers, simdgroup_barriers;  // executed, per threadgroup and per simdgroup
  uint64_t simd_operations, matrix_multiplies;        // executed, per simdgroup
  uint64_t threadgroups, threads;
};

struct Outcome {
  uint64_t switches, accesses, threadgroup_bytes;
  uint64_t sites[2];  // code addresses, relative to the library, of {0} and {1} in the message; 0: unknown
  uint32_t failed, meetings;
  uint64_t meeting[2 * 64];  // pairs of code addresses at which threads met in one barrier or simd operation
  char kind[32], message[512];
};

}  // namespace msl
