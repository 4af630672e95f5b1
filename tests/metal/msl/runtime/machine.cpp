// Runs a kernel on one CPU thread: each thread of a threadgroup is a fiber, threadgroups run one after another.
// Barriers and simd operations are meetings; a meeting that cannot happen is reported as divergence.
#include "machine.h"

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <string>
#include <vector>

#include "hooks.h"

extern "C" void msl_switch(void** save, void* to);

// Saves the callee's registers on the old stack and takes them from the new one.
#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,%function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size msl_switch,.-msl_switch
)");
#else
#error "the machine knows x86-64 and aarch64"
#endif

namespace msl {

#ifdef MSL_OBSERVED
constexpr bool observed = true;
constexpr size_t slot_gap = 64;  // bytes between threadgroup variables, so that running over one's end is seen
#else
constexpr bool observed = false;
constexpr size_t slot_gap = 0;
#endif
constexpr size_t buffer_gap = 1 << 20;

Fiber* running;
Launch launch;
uint32_t current_group;
Outcome* outcome;
alignas(256) static char arena_memory[4 * max_threadgroup_bytes];
char* const arena = arena_memory;
size_t arena_bytes;

static Fiber fibers[max_threads];
static int threads;
static void* scheduler_stack;
static void (*kernel)();
static uint64_t random_state;
static U3 full_group_size;
static std::vector<Slot_> slots;
static unsigned char deposits[2][max_threads][64];
static uint32_t active[2][max_threads / simd_width];
static double deadline;
static uint32_t atomics_in_a_row;

uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 11);
}
static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// ------------------------------------------------------------------ failures

static const char *module_low, *module_high;
static int find_module(dl_phdr_info* info, size_t, void*) {
  const char *low = (const char*)~0ull, *high = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const char* a = (const char*)info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    low = std::min(low, a);
    high = std::max(high, a + info->dlpi_phdr[i].p_memsz);
  }
  const char* here = (const char*)&fibers;
  if (here < low || here >= high) return 0;
  module_low = low;
  module_high = high;
  return 1;
}
bool in_module(const void* p) { return p >= module_low && p < module_high; }
uint64_t relative(const void* site) {
  return in_module(site) ? uint64_t((const char*)site - module_low) - 1 : 0;  // inside the call, not after it
}

static void record_failure(const char* kind, const void* site, uint64_t other, const char* message) {
  if (outcome->failed) return;
  outcome->failed = 1;
  outcome->sites[0] = relative(site);
  outcome->sites[1] = other;
  snprintf(outcome->kind, sizeof outcome->kind, "%s", kind);
  snprintf(outcome->message, sizeof outcome->message, "%s", message);
}
void yield_thread() {
  outcome->switches++;
  msl_switch(&running->stack_pointer, scheduler_stack);
}
void stop(const char* kind, const void* site, uint64_t other, const char* format, ...) {
  char text[sizeof outcome->message];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  record_failure(kind, site, other, text);
  running->state = State::exited;
  for (;;) yield_thread();
}
void check_time() {
  if (now() > deadline)
    stop("hang", running->site, 0, "the launch took longer than %.0f s (last synchronisation at {0})", launch.seconds);
}

// ------------------------------------------------------------------ scheduling

static void thread_main() {
  kernel();
  running->state = State::exited;
  for (;;) yield_thread();
}
static void prepare_stack(Fiber& f) {
  void** top = (void**)(f.stack + stack_bytes - 64);
#if defined(__x86_64__)
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = (void*)thread_main;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = (void*)thread_main;  // x30
#endif
  f.stack_pointer = top;
}
static void resume(int i) {
  running = &fibers[i];
  atomics_in_a_row = 0;
  msl_switch(&scheduler_stack, running->stack_pointer);
}

static void note_meeting(const Fiber& a, const Fiber& b) {
  uint64_t x = relative(a.site), y = relative(b.site);
  if (x > y) std::swap(x, y);
  for (uint32_t i = 0; i < outcome->meetings; ++i)
    if (outcome->meeting[2 * i] == x && outcome->meeting[2 * i + 1] == y) return;
  if (outcome->meetings == 64) return;
  outcome->meeting[2 * outcome->meetings] = x;
  outcome->meeting[2 * outcome->meetings + 1] = y;
  outcome->meetings++;
}

static std::string describe(const Fiber& f, const char* place) {
  static const char* names[] = {"runs", "waits in a simd operation at ", "waits in simdgroup_barrier at ",
                                "waits in threadgroup_barrier at ", "has exited"};
  bool waits = f.state != State::ready && f.state != State::exited;
  return "thread " + std::to_string(f.thread.index) + " " + names[(int)f.state] + (waits ? place : "");
}
static void diverged(const Fiber* a, const Fiber* b) {
  std::string text = describe(*a, "{0}") + " while " + describe(*b, "{1}");
  bool waits = b->state != State::ready && b->state != State::exited;
  record_failure("divergence", a->site, waits ? relative(b->site) : 0, text.c_str());
}

struct Scheduler {
  std::vector<int> queue;
  size_t head = 0;
  uint32_t priority[max_threads / simd_width];

  void new_priorities() {
    for (auto& p : priority) p = random_bits();
  }
  void push(int i) { queue.push_back(i); }
  int pop() {
    size_t k = head;
    if (launch.schedule & 1) {
      k = head + random_bits() % (queue.size() - head);
    } else if (launch.schedule) {
      for (size_t j = head + 1; j < queue.size(); ++j)
        if (priority[fibers[queue[j]].thread.simdgroup] < priority[fibers[queue[k]].thread.simdgroup]) k = j;
    }
    int i = queue[k];
    queue[k] = queue[head++];
    if (head > 4096) {
      queue.erase(queue.begin(), queue.begin() + (long)head);
      head = 0;
    }
    return i;
  }

  // Lets a simdgroup go on once all its lanes wait at one operation or have exited.
  void release_simdgroup(uint32_t simdgroup) {
    int first = (int)simdgroup * simd_width, last = std::min(threads, first + simd_width);
    Fiber *waiting = nullptr, *gone = nullptr;
    uint32_t mask = 0;
    for (int i = first; i < last; ++i) {
      Fiber& f = fibers[i];
      if (f.state == State::ready) return;
      if (f.state == State::exited) {
        gone = &f;
        continue;
      }
      if (!waiting) waiting = &f;
      if (f.state != waiting->state || f.operation != waiting->operation) return;  // stuck() tells if it never resolves
      if (f.site != waiting->site) note_meeting(f, *waiting);
      mask |= 1u << (i - first);
    }
    if (!waiting || waiting->state == State::at_threadgroup_barrier) return;
    bool barrier = waiting->state == State::at_simdgroup_barrier;
    if (barrier && gone) return diverged(waiting, gone);
    active[waiting->parity][simdgroup] = mask;
    if constexpr (observed) {
      observer::meet(simdgroup);
      barrier ? observer::barrier(false) : observer::operation();
    }
    for (int i = first; i < last; ++i) {
      Fiber& f = fibers[i];
      if (f.state == State::exited) continue;
      if (barrier && f.operation & 1) f.device.simdgroup++;
      if (barrier && f.operation & 2) f.threadgroup.simdgroup++;
      f.state = State::ready;
      push(i);
    }
  }

  // Nobody can run: all threads are at one threadgroup barrier, or have exited, or the kernel diverged.
  bool release_group() {
    const Fiber *waiting = nullptr, *other = nullptr;
    int waits = 0, exited = 0;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers[i];
      exited += f.state == State::exited;
      if (f.state != State::at_threadgroup_barrier) continue;
      waits++;
      if (!waiting) waiting = &f;
      if (f.operation != waiting->operation) other = &f;
      if (f.site != waiting->site) note_meeting(f, *waiting);
    }
    if (exited == threads) return false;
    if (waits == threads && !other) {
      if constexpr (observed) {
        for (int s = 0; s * simd_width < threads; ++s) observer::meet((uint32_t)s);
        observer::barrier(true);
      }
      new_priorities();
      for (int i = 0; i < threads; ++i) {
        Fiber& f = fibers[i];
        if (f.operation & 1) f.device.group++;
        if (f.operation & 2) f.threadgroup.group++;
        f.state = State::ready;
        push(i);
      }
      return true;
    }
    stuck(waiting, other);
    return false;
  }
  void stuck(const Fiber* waiting, const Fiber* other) {
    for (int i = 0; i < threads && !other; ++i)
      if (waiting && fibers[i].state != State::at_threadgroup_barrier) other = &fibers[i];
    // Without a threadgroup barrier two lanes of one simdgroup wait at different operations.
    for (int i = 0; i < threads && !waiting; ++i) {
      const Fiber& f = fibers[i];
      if (f.state == State::exited) continue;
      for (int j = i + 1; j < threads; ++j) {
        const Fiber& g = fibers[j];
        if (g.thread.simdgroup != f.thread.simdgroup || g.state == State::exited) continue;
        if (g.state == f.state && g.operation == f.operation) continue;
        waiting = &f;
        other = &g;
        break;
      }
    }
    diverged(waiting, other);
  }

  void run() {
    queue.clear();
    head = 0;
    new_priorities();
    for (int i = 0; i < threads; ++i) push(i);
    for (uint32_t turn = 0; !outcome->failed; ++turn) {
      if (head >= queue.size()) {
        queue.clear();
        head = 0;
        if (!release_group()) return;
        continue;
      }
      int i = pop();
      resume(i);
      if (turn % 4096 == 4095 && now() > deadline) {
        record_failure("hang", fibers[i].site, 0,
                       "the launch took longer than its time limit (last synchronisation at {0})");
        return;
      }
      State s = fibers[i].state;
      if (s == State::ready)
        push(i);
      else if (s != State::at_threadgroup_barrier)
        release_simdgroup(fibers[i].thread.simdgroup);
    }
  }
};

// ------------------------------------------------------------------ threadgroup memory, function constants

Slot_* slot_at(const char* p) {
  for (Slot_& s : slots)
    if (p >= s.memory && p < s.memory + s.bytes) return &s;
  return nullptr;
}

struct Constant {
  void* where;
  int bytes, index;
  bool given;
};
static std::vector<Constant>& constants() {
  static std::vector<Constant> list;
  return list;
}
static std::vector<void (*)()>& derived() {
  static std::vector<void (*)()> list;
  return list;
}

static Scheduler scheduler;

static void run_group(uint32_t index, U3 groups) {
  current_group = index;
  U3 at = {index % groups.x, index / groups.x % groups.y, index / groups.x / groups.y}, full = full_group_size;
  U3 size = {std::min(full.x, launch.grid.x - at.x * full.x), std::min(full.y, launch.grid.y - at.y * full.y),
             std::min(full.z, launch.grid.z - at.z * full.z)};
  threads = int(size.x * size.y * size.z);
  memset(arena, 0xff, arena_bytes);  // NaNs where a kernel forgets to write
  slots.clear();
  arena_bytes = 0;
  if constexpr (observed) observer::begin_group();
  uint32_t simdgroups = uint32_t(threads + simd_width - 1) / simd_width;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    uint32_t u = (uint32_t)i;
    U3 position = {u % size.x, u / size.x % size.y, u / size.x / size.y};
    char* stack = launch.stacks + size_t(i) * stack_bytes;
    f = Fiber{};
    f.thread = {position, at, size, groups, launch.grid, full, u, u % simd_width, u / simd_width, simdgroups};
    f.stack = stack;
    prepare_stack(f);
  }
  scheduler.run();
  if constexpr (observed)
    for (uint32_t s = 0; s < simdgroups; ++s) observer::meet(s);
}

// The buffers of an observed launch live far from each other, at the alignment that Metal gives them; those that are
// one memory stay one.
struct Guarded {
  char* memory = nullptr;
  size_t bytes = 0;
  static Buffer* same(const Launch& given, int i) {
    for (int j = 0; j < i; ++j)
      if (given.buffers[i].size && given.buffers[j].data == given.buffers[i].data &&
          given.buffers[j].size == given.buffers[i].size)
        return &launch.buffers[j];
    return nullptr;
  }
  bool take_in(const Launch& given) {
    bytes = buffer_gap;
    for (auto& b : given.buffers)
      if (b.data) bytes += (b.size + 4095) / 4096 * 4096 + buffer_gap;
    void* m = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return false;
    memory = (char*)m;
    char* at = memory + buffer_gap;
    for (int i = 0; i < max_buffers; ++i) {
      Buffer& b = launch.buffers[i];
      if (!b.data) continue;
      if (Buffer* first = same(given, i)) {  // by which accesses find both
        b.data = first->data;
        first->writable |= b.writable;
        continue;
      }
      memcpy(at, given.buffers[i].data, b.size);
      b.data = at;
      at += (b.size + 4095) / 4096 * 4096 + buffer_gap;
    }
    return true;
  }
  void give_back(const Launch& given) {
    for (int i = 0; i < max_buffers; ++i)
      if (given.buffers[i].data && given.buffers[i].writable)
        memcpy(given.buffers[i].data, launch.buffers[i].data, given.buffers[i].size);
    munmap(memory, bytes);
  }
};

}  // namespace msl

using namespace msl;

// ------------------------------------------------------------------ services to kernels

extern "C" {

const Thread* msl_self() { return &running->thread; }
const Launch* msl_launch_state() { return &launch; }

void msl_threadgroup_barrier(int flags, const void* site) {
  running->state = State::at_threadgroup_barrier;
  running->operation = flags;
  running->site = site;
  yield_thread();
}
void msl_simdgroup_barrier(int flags, const void* site) {
  running->state = State::at_simdgroup_barrier;
  running->operation = flags;
  running->site = site;
  yield_thread();
}
const unsigned char* msl_exchange(const void* value, int bytes, int operation, const void* site, uint32_t* mask) {
  uint32_t parity = running->parity, simdgroup = running->thread.simdgroup;
  memcpy(deposits[parity][running->thread.index], value, (size_t)bytes);
  running->state = State::at_simd_operation;
  running->operation = operation;
  running->site = site;
  yield_thread();
  running->parity ^= 1;
  *mask = active[parity][simdgroup];
  return deposits[parity][simdgroup * simd_width];
}
void* msl_threadgroup_slot(int id, size_t bytes, size_t align, size_t grain) {
  for (Slot_& s : slots)
    if (s.id == id && s.bytes == bytes) return s.memory;
  size_t used = bytes, at = (arena_bytes + std::max(align, size_t(16)) - 1) / std::max(align, size_t(16)) *
                            std::max(align, size_t(16));
  for (Slot_& s : slots) used += s.bytes;
  if (used > max_threadgroup_bytes)
    stop("threadgroup_memory", __builtin_return_address(0), 0,
         "the kernel uses %zu bytes of threadgroup memory but a threadgroup has %zu", used, max_threadgroup_bytes);
  slots.push_back({id, arena + at, bytes, (uint32_t)grain});
  arena_bytes = at + bytes + slot_gap;
  outcome->threadgroup_bytes = std::max<uint64_t>(outcome->threadgroup_bytes, used);
  return arena + at;
}
void msl_atomic_access(const volatile void* p, int bytes, bool write, const void* site) {
  if constexpr (observed) observer::access(p, (uint32_t)bytes, write, true, true, site);
  // A thread that spins on an atomic must let the others come.
  if (++atomics_in_a_row > 10000 || (launch.schedule && random_bits() % 4 == 0)) yield_thread();
}
void msl_matrix_multiply() {
  if constexpr (observed) observer::matrix_multiply();
}
void msl_misuse(const char* what, const void* site) { stop("misuse", site, 0, "a simd operation at {0} %s", what); }

void msl_register_constant(void* where, int bytes, int index) { constants().push_back({where, bytes, index, false}); }
void msl_register_derived(void (*initialise)()) { derived().push_back(initialise); }
int msl_constant_defined(const void* where) {
  for (auto& c : constants())
    if (c.where == where) return c.given;
  return 0;
}

// ------------------------------------------------------------------ services to Python

#define MSL_PUBLIC __attribute__((visibility("default")))

MSL_PUBLIC void msl_clear_constants() {
  for (auto& c : constants()) {
    c.given = false;
    memset(c.where, 0, (size_t)c.bytes);
  }
}
// Bytes that the constant takes, or 0 where the program has none of that index.
MSL_PUBLIC int msl_set_constant(int index, const void* value, int bytes) {
  int size = 0;
  for (auto& c : constants()) {
    if (c.index != index) continue;
    size = c.bytes;
    if (bytes != c.bytes) continue;
    memcpy(c.where, value, (size_t)bytes);
    c.given = true;
  }
  return size;
}
// A stack for each thread of a threadgroup with an inaccessible page below; null where there is no memory.
MSL_PUBLIC char* msl_make_stacks() {
  size_t bytes = max_threads * stack_bytes;
  void* m = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return nullptr;
  for (size_t i = 0; i < max_threads; ++i) mprotect((char*)m + i * stack_bytes, 4096, PROT_NONE);
  return (char*)m;
}
MSL_PUBLIC int msl_run(void (*run)(), const Launch* given, Outcome* result) {
  if (!module_high) dl_iterate_phdr(find_module, nullptr);
  memset(result, 0, sizeof *result);
  outcome = result;
  launch = *given;
  kernel = run;
  full_group_size = given->group;
  random_state = given->schedule * 0x9E3779B97F4A7C15ull + 1;
  deadline = now() + given->seconds;
  U3 g = given->grid, t = given->group;
  U3 groups = {(g.x + t.x - 1) / t.x, (g.y + t.y - 1) / t.y, (g.z + t.z - 1) / t.z};
  std::vector<uint32_t> order(size_t(groups.x) * groups.y * groups.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = uint32_t(i);
  if (given->schedule)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  Guarded guarded;
  if (observed && !guarded.take_in(*given)) return -1;
  if constexpr (observed) observer::begin();
  for (auto initialise : derived()) initialise();
  for (size_t i = 0; i < order.size() && !result->failed; ++i) run_group(order[i], groups);
  running = nullptr;
  if constexpr (observed) observer::end();
  if constexpr (observed) guarded.give_back(*given);
  return (int)result->failed;
}
}
