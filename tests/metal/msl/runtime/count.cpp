// The counted mode's observer: what the lanes of a simdgroup access together, in 128-byte lines and memory banks.
//
// Lanes run one after another here, so an access of a simdgroup is put together again: the n-th time that each lane
// reaches one load or store between two meetings of the simdgroup. That is exact where lanes loop alike.
#include <string.h>

#include <algorithm>
#include <vector>

#include "machine.h"

namespace msl::observer {

constexpr uint64_t line_bytes = 128;
constexpr int banks = 32, bank_bytes = 4;
constexpr int threadgroup_space = max_buffers;

struct Event {
  const void* site;
  uint64_t address;
  uint32_t bytes, turn;
  uint8_t lane, space;
  bool write;
};
// What has touched each line of a buffer: the last threadgroup (plus one), and whether the dispatch read or wrote it.
struct Lines {
  std::vector<uint32_t> group;
  std::vector<uint8_t> read, written;
};

static Counts counts;
static std::vector<Event> events[max_threads / simd_width];
static Lines lines[max_buffers];

void begin() {
  memset(&counts, 0, sizeof counts);
  for (int i = 0; i < max_buffers; ++i) {
    size_t n = launch.buffers[i].data ? launch.buffers[i].size / line_bytes + 1 : 0;
    lines[i].group.assign(n, 0);
    lines[i].read.assign(n, 0);
    lines[i].written.assign(n, 0);
  }
}
void begin_group() {
  counts.threadgroups++;
  for (auto& e : events) e.clear();
}

void access(const volatile void* address, uint32_t bytes, bool write, bool atomic, bool, const void* site) {
  if (!running || outcome->failed || !bytes) return;
  const char* p = (const char*)address;
  if (p >= running->stack && p < running->stack + stack_bytes) return;
  if (++outcome->accesses % (1 << 20) == 0) check_time();
  int space = -1;
  uint64_t offset = 0;
  if (p >= arena && p < arena + 4 * max_threadgroup_bytes) {
    space = threadgroup_space;
    offset = uint64_t(p - arena);
  } else {
    for (int i = 0; i < max_buffers && space < 0; ++i) {
      const char* base = (const char*)launch.buffers[i].data;
      if (!base || p < base || p >= base + launch.buffers[i].size) continue;
      space = i;
      offset = uint64_t(p - base);
    }
  }
  if (space < 0) return;
  if (atomic) {
    (space == threadgroup_space ? counts.threadgroup_atomics : counts.buffers[space].atomics)++;
    return;
  }
  const Thread& t = running->thread;
  events[t.simdgroup].push_back({site, offset, bytes, 0, (uint8_t)t.lane, (uint8_t)space, write});
}

// Distinct bytes of sorted intervals, and a call for each distinct unit of `unit` bytes.
template <class F>
static uint64_t cover(const Event* first, const Event* last, uint64_t unit, F each_unit) {
  uint64_t bytes = 0, end = 0, next_unit = 0;
  for (const Event* e = first; e != last; ++e) {
    uint64_t from = std::max(e->address, end), to = e->address + e->bytes;
    if (to > from) {
      bytes += to - from;
      end = to;
    }
    for (uint64_t u = std::max(e->address / unit, next_unit); u <= (to - 1) / unit; ++u) {
      each_unit(u);
      next_unit = u + 1;
    }
  }
  return bytes;
}

static void count_device(const Event* first, const Event* last) {
  Traffic& t = counts.buffers[first->space];
  Lines& l = lines[first->space];
  bool one_address = first->address == (last - 1)->address;
  uint64_t transactions = 0;
  uint64_t bytes = cover(first, last, line_bytes, [&](uint64_t u) {
    transactions++;
    if (l.group[u] != current_group + 1) t.group_lines++;
    l.group[u] = current_group + 1;
    auto& touched = first->write ? l.written[u] : l.read[u];
    if (!touched) (first->write ? t.written_lines : t.read_lines)++;
    touched = 1;
  });
  (first->write ? t.write_bytes : t.read_bytes) += bytes;
  if (one_address) {
    t.scalar_accesses++;
    t.scalar_bytes += bytes;
  } else {
    (first->write ? t.write_transactions : t.read_transactions) += transactions;
  }
}

static void count_threadgroup(const Event* first, const Event* last) {
  uint32_t load[banks] = {}, words = 0;
  uint64_t bytes = cover(first, last, bank_bytes, [&](uint64_t u) {
    load[u % banks]++;
    words++;
  });
  (first->write ? counts.threadgroup_write_bytes : counts.threadgroup_read_bytes) += bytes;
  counts.threadgroup_cycles += *std::max_element(load, load + banks);
  counts.threadgroup_ideal_cycles += (words + banks - 1) / banks;
}

void meet(uint32_t simdgroup) {
  auto& list = events[simdgroup];
  if (list.empty()) return;
  auto same_place = [](const Event& a, const Event& b) {
    return a.site == b.site && a.write == b.write && a.space == b.space;
  };
  std::stable_sort(list.begin(), list.end(), [](const Event& a, const Event& b) {
    if (a.site != b.site) return a.site < b.site;
    if (a.write != b.write) return a.write < b.write;
    return a.space < b.space;
  });
  for (size_t i = 0; i < list.size();) {
    size_t j = i;
    uint32_t turns[simd_width] = {};
    for (; j < list.size() && same_place(list[i], list[j]); ++j) list[j].turn = turns[list[j].lane]++;
    std::sort(list.begin() + (long)i, list.begin() + (long)j, [](const Event& a, const Event& b) {
      return a.turn != b.turn ? a.turn < b.turn : a.address < b.address;
    });
    while (i < j) {
      size_t k = i;
      while (k < j && list[k].turn == list[i].turn) ++k;
      (list[i].space == threadgroup_space ? count_threadgroup : count_device)(&list[i], &list[k]);
      i = k;
    }
  }
  list.clear();
}

void barrier(bool whole_group) { (whole_group ? counts.threadgroup_barriers : counts.simdgroup_barriers)++; }
void operation() { counts.simd_operations++; }
void matrix_multiply() {
  if (running->thread.lane == 0) counts.matrix_multiplies++;
}
void end() { counts.threads = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z; }

}  // namespace msl::observer

extern "C" __attribute__((visibility("default"))) void msl_counts(msl::Counts* to) { *to = msl::observer::counts; }
