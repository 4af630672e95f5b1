// The checked mode's observer: bounds, read-only buffers, alignment, uninitialised memory, data races.
//
// Order between accesses: within a thread; by a threadgroup barrier for the kinds of memory it names; by a simdgroup
// barrier within a simdgroup; never across threadgroups. Simd operations and relaxed atomics order nothing.
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "machine.h"

namespace msl::observer {

// A set of accesses to one cell, all of the latest epoch, as exact as deciding "is one unordered before me" needs.
struct Record {
  uint32_t thread = 0;  // threadgroup * 1024 + index + 1 of the latest; 0: none
  uint32_t epoch = 0, sub = 0;
  uint32_t others = 0;  // 1 + the largest sub-epoch of other threads of the latest's simdgroup; 0: none
  uint32_t site = 0;
  bool many_simdgroups = false, other_groups = false;
};
struct Cell {
  Record write, reads, atomic_writes, atomic_reads;
  uint32_t written = 0;  // 1 + the threadgroup that wrote it (threadgroup memory), or 1 (device memory)
};
struct Me {
  uint32_t thread, epoch, sub, site;
};

static uint32_t group_of(uint32_t thread) { return (thread - 1) / max_threads; }
static uint32_t simdgroup_of(uint32_t thread) { return (thread - 1) / simd_width; }  // unique over threadgroups

static bool unordered(const Record& r, const Me& me, bool device) {
  if (!r.thread) return false;
  if (group_of(r.thread) != group_of(me.thread)) return device;  // threadgroup memory begins anew with each threadgroup
  if (r.other_groups) return true;
  if (r.epoch < me.epoch) return false;
  if (r.many_simdgroups || simdgroup_of(r.thread) != simdgroup_of(me.thread)) return true;
  return r.others > me.sub || (r.thread != me.thread && r.sub >= me.sub);
}
static void add(Record& r, const Me& me, bool device) {
  bool same_group = r.thread && group_of(r.thread) == group_of(me.thread);
  if (!same_group || r.epoch < me.epoch) {
    bool others = device && (r.other_groups || (r.thread && !same_group));
    r = Record{me.thread, me.epoch, me.sub, 0, me.site, false, others};
    return;
  }
  if (r.thread != me.thread) {
    if (simdgroup_of(r.thread) != simdgroup_of(me.thread)) r.many_simdgroups = true;
    r.others = std::max(r.others, r.sub + 1);
    r.thread = me.thread;
  }
  r.sub = me.sub;
  r.site = me.site;
}

// The history of a region, a cell a grain. A narrower access than the grain splits the cells.
struct Shadow {
  std::vector<Cell> cells;
  uint32_t grain = 1;
  size_t bytes = 0;
  void reset(size_t size, uint32_t cell) {
    grain = cell ? cell : 1;
    bytes = size;
    cells.assign((size + grain - 1) / grain, Cell{});
  }
  void refine(uint32_t finer) {
    std::vector<Cell> fine((bytes + finer - 1) / finer);
    for (size_t i = 0; i < fine.size(); ++i) fine[i] = cells[i * finer / grain];
    cells.swap(fine);
    grain = finer;
  }
};
static Shadow buffers[max_buffers];
// The addresses that an access of buffer `place` may have gone astray to.
struct Reach {
  const char *begin, *end;
  int place;
};
static std::vector<Reach> bound;
struct SlotShadow {
  int id;
  size_t bytes;
  Shadow shadow;
};
static std::vector<SlotShadow> slot_shadows;

static Shadow& shadow_of(const Slot_& slot) {
  for (auto& s : slot_shadows)
    if (s.id == slot.id && s.bytes == slot.bytes) return s.shadow;
  slot_shadows.push_back({slot.id, slot.bytes, {}});
  slot_shadows.back().shadow.reset(slot.bytes, slot.grain);
  return slot_shadows.back().shadow;
}

void begin() {
  slot_shadows.clear();
  bound.clear();
  for (int i = 0; i < max_buffers; ++i) {
    const Buffer& b = launch.buffers[i];
    const char* p = (const char*)b.data;
    if (p) bound.push_back({p - (1 << 19), p + b.size + (1 << 19), i});
    if (b.data && (b.writable || b.undefined)) buffers[i].reset(b.size, b.cell);
  }
}
void begin_group() {}
void meet(uint32_t) {}
void barrier(bool) {}
void operation() {}
void matrix_multiply() {}
void end() {
  for (auto& s : buffers) s.cells.clear();
}

struct Name {
  char text[24];
};
static Name name_of(int buffer) {
  Name name{"threadgroup memory"};
  if (buffer >= 0) snprintf(name.text, sizeof name.text, "buffer(%d)", buffer);
  return name;
}
struct Place {
  int buffer;  // -1: threadgroup memory
  uint64_t offset;
  uint32_t bytes;
  bool write, atomic;
  const void* site;
};
[[noreturn]] static void race(const Record& other, const char* what, const Place& at) {
  uint32_t t = other.thread - 1;
  stop("data_race", at.site, other.site,
       "%s%s of %u bytes at %s + %llu by thread %u of threadgroup %u (at {0}) is not ordered after the %s by thread %u "
       "of threadgroup %u (at {1})",
       at.atomic ? "atomic " : "", at.write ? "write" : "read", at.bytes, name_of(at.buffer).text,
       (unsigned long long)at.offset, running->thread.index, current_group, what, t % max_threads, t / max_threads);
}

static void visit(Shadow& shadow, uint64_t offset, const Place& at, bool device, bool must_be_written,
                  const Clock& clock) {
  if (at.bytes < shadow.grain || offset % shadow.grain) shadow.refine(1);
  Me me{current_group * max_threads + running->thread.index + 1, clock.group, clock.simdgroup,
        (uint32_t)relative(at.site)};
  uint32_t written_mark = device ? 1 : current_group + 1;
  for (uint64_t i = offset / shadow.grain; i <= (offset + at.bytes - 1) / shadow.grain; ++i) {
    Cell& c = shadow.cells[i];
    if (!at.write && must_be_written && c.written != written_mark)
      stop("uninitialised", at.site, 0,
           "read of %u bytes at %s + %llu, which nobody has written, by thread %u of threadgroup %u at {0}", at.bytes,
           name_of(at.buffer).text, (unsigned long long)at.offset, running->thread.index, current_group);
    if (unordered(c.write, me, device)) race(c.write, "write", at);
    if ((at.write || !at.atomic) && unordered(c.atomic_writes, me, device) && !at.atomic)
      race(c.atomic_writes, "atomic write", at);
    if (at.write) {
      if (unordered(c.reads, me, device)) race(c.reads, "read", at);
      if (!at.atomic && unordered(c.atomic_reads, me, device)) race(c.atomic_reads, "atomic read", at);
      c.written = written_mark;
    }
    if (!at.write) {
      add(at.atomic ? c.atomic_reads : c.reads, me, device);
    } else if (at.atomic) {
      add(c.atomic_writes, me, device);
    } else {  // ordered after all before it, so it stands for them
      c.reads = c.atomic_reads = c.atomic_writes = Record{};
      c.write = Record{me.thread, me.epoch, me.sub, 0, me.site, false, false};
    }
  }
}

void access(const volatile void* address, uint32_t bytes, bool write, bool atomic, bool aligned, const void* site) {
  if (!running || outcome->failed || !bytes) return;
  const char* p = (const char*)address;
  if (p >= running->stack && p < running->stack + stack_bytes) return;
  if (++outcome->accesses % (1 << 20) == 0) check_time();
  if (!atomic && launch.schedule & 1 && random_bits() % 64 == 0) yield_thread();
  const char* verb = write ? "write" : "read";
  uint32_t index = running->thread.index;
  uint32_t natural = std::min(bytes, 16u);
  bool misplaced = aligned && (uintptr_t)p % natural;
  if (p >= arena && p < arena + 4 * max_threadgroup_bytes) {
    Slot_* slot = slot_at(p);
    if (!slot || p + bytes > slot->memory + slot->bytes)
      stop("out_of_bounds", site, 0,
           "%s of %u bytes outside of any threadgroup variable by thread %u of threadgroup %u at {0}", verb, bytes,
           index, current_group);
    uint64_t offset = uint64_t(p - slot->memory);
    if (misplaced)
      stop("misaligned", site, 0,
           "%s of %u bytes at offset %llu of threadgroup memory by thread %u of threadgroup %u at {0}", verb, bytes,
           (unsigned long long)offset, index, current_group);
    Place at{-1, offset, bytes, write, atomic, site};
    visit(shadow_of(*slot), offset, at, false, !launch.allow_uninitialised, running->threadgroup);
    return;
  }
  for (const Reach& reach : bound) {
    if (p < reach.begin || p >= reach.end) continue;
    int i = reach.place;
    const Buffer& b = launch.buffers[i];
    long long offset = p - (const char*)b.data;
    if (offset < 0 || offset + (long long)bytes > (long long)b.size)
      stop("out_of_bounds", site, 0,
           "%s of %u bytes at %s %+lld, which holds %llu bytes, by thread %u of threadgroup %u at {0}", verb, bytes,
           name_of(i).text, offset, (unsigned long long)b.size, index, current_group);
    if (write && !b.writable)
      stop("read_only", site, 0,
           "write of %u bytes at %s + %lld, which is const, by thread %u of threadgroup %u at {0}", bytes,
           name_of(i).text, offset, index, current_group);
    if (misplaced)
      stop("misaligned", site, 0, "%s of %u bytes at %s + %lld by thread %u of threadgroup %u at {0}", verb, bytes,
           name_of(i).text, offset, index, current_group);
    if (b.writable || b.undefined) {
      Place at{i, (uint64_t)offset, bytes, write, atomic, site};
      visit(buffers[i], (uint64_t)offset, at, true, b.undefined, running->device);
    }
    return;
  }
  if (in_module(p)) {
    if (write)
      stop("read_only", site, 0, "write of %u bytes to program memory by thread %u of threadgroup %u at {0}", bytes,
           index, current_group);
    return;
  }
  stop("out_of_bounds", site, 0,
       "%s of %u bytes at an address in no bound buffer (%s) by thread %u of threadgroup %u at {0}", verb, bytes,
       (uintptr_t)p < (1 << 20) ? "is a buffer missing?" : "another thread's memory?", index, current_group);
}

}  // namespace msl::observer
