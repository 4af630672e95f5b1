#include "cpu/eval.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <future>
#include <mutex>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlxsae::cpu {

namespace {

#if defined(__linux__)
/** madvise on the whole large pages of an array that has at least a few. */
void advise(const void* data, size_t bytes, int what) {
  constexpr uintptr_t page = 2u << 20;
  auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (bytes >= 4 * page && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, what);
}
#endif

}  // namespace

void allocate(mx::array& out) {
  // MLX's allocator on the CPU gives memory 24 bytes behind a cache line, so that every wide load touches two lines.
  constexpr uintptr_t line = 64;
  auto data = mx::allocator::malloc(out.nbytes() + line);
  uintptr_t skip = -reinterpret_cast<uintptr_t>(data.buffer().raw_ptr()) % line;
  // An array without memory has all flags set; a matrix is not contiguous by columns as well as by rows.
  auto flags = out.flags();
  flags.col_contiguous = std::count_if(out.shape().begin(), out.shape().end(), [](auto n) { return n > 1; }) <= 1;
  out.set_data(std::move(data), out.size(), out.strides(), flags, static_cast<int64_t>(skip));
#if defined(__linux__)
  advise(out.data<char>(), out.nbytes(), MADV_HUGEPAGE);
#endif
}

void settle(const void* data, size_t bytes) {
#if defined(__linux__)
  // A second call would cost the kernel a look at every page, so the last arrays are remembered.
  static std::mutex mutex;
  static std::deque<std::pair<const void*, size_t>> settled;
  std::pair array{data, bytes};
  std::lock_guard lock(mutex);
  if (std::find(settled.begin(), settled.end(), array) != settled.end()) return;
  settled.push_back(array);
  if (settled.size() > 64) settled.pop_front();
  constexpr int collapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers do not name
  advise(data, bytes, MADV_HUGEPAGE);
  advise(data, bytes, collapse);
#endif
}

namespace {
std::atomic<int> failures{0};
}

void task_failed() { ++failures; }

void give_back_lost_tasks(mx::Stream s) {
  if (failures == 0) return;
  auto done = std::make_shared<std::promise<void>>();
  mx::scheduler::enqueue(s, [done] { done->set_value(); });
  done->get_future().wait();
  // Other streams may have tasks under way: what is taken from them by mistake only lets MLX run a little further
  // ahead.
  for (int lost = std::min(failures.exchange(0), mx::scheduler::n_active_tasks()); lost > 0; --lost)
    mx::scheduler::notify_task_completion(s);
}

void parallel_ranges(int64_t n, int64_t least, const std::function<void(int64_t, int64_t)>& task) {
  if (n <= 0) return;
  int64_t parts = std::clamp<int64_t>(n / std::max<int64_t>(1, least), 1, 8 * num_threads());
  parallel_for(parts, [&](int64_t i, int) { task(n * i / parts, n * (i + 1) / parts); });
}

void check_code(const char* op, const Code& code, int64_t d_sae) {
  if (code.offsets) {
    bool ordered = code.offsets[0] == 0 && code.size() <= code.room;
    for (int64_t t = 0; t < code.n; ++t) ordered &= code.offsets[t] <= code.offsets[t + 1];
    if (!ordered)
      throw std::out_of_range(std::string("[") + op + "] offsets must ascend from 0 to at most nnz=" +
                              std::to_string(code.room) + " but do not.");
  }
  std::atomic<uint32_t> largest = 0;
  parallel_ranges(code.size(), 1 << 16, [&](int64_t begin, int64_t end) {
    uint32_t here = *std::max_element(code.indices + begin, code.indices + end), before = largest;
    while (here > before && !largest.compare_exchange_weak(before, here)) {
    }
  });
  if (code.size() > 0 && largest >= d_sae)
    throw std::out_of_range(std::string("[") + op + "] indices must be below d_sae=" + std::to_string(d_sae) +
                            " but got " + std::to_string(largest.load()) + ".");
}

namespace {

float value_at(const Code& c, int64_t i) {
  if (!c.values) return 1.0f;
  switch (c.type) {
    case Type::f32:
      return static_cast<const float*>(c.values)[i];
    case Type::f16:
      return static_cast<float>(static_cast<const mx::float16_t*>(c.values)[i]);
    case Type::bf16:
      return static_cast<float>(static_cast<const mx::bfloat16_t*>(c.values)[i]);
  }
  return 0;
}

}  // namespace

Grouped::Grouped(const Code& c, int64_t d_sae, bool positive) : starts_(d_sae + 1, 0) {
  int64_t nnz = c.size();
  rows_ = std::make_unique_for_overwrite<uint32_t[]>(nnz + 4);
  values_ = std::make_unique_for_overwrite<float[]>(nnz + 1);
  auto row = [&](int64_t t) { return c.offsets ? c.offsets[t] : t * c.k; };
  // Each part of the rows counts for itself and then has its own places in every feature, behind the parts before it.
  constexpr int64_t kPartEntries = 1 << 16;
  int64_t parts = std::clamp<int64_t>(nnz / kPartEntries, 1, std::min(num_threads(), 8));
  std::vector<int64_t> next(parts * d_sae, 0);
  const float* plain = c.type == Type::f32 ? static_cast<const float*>(c.values) : nullptr;
  auto each = [&](int64_t p, auto&& take) {
    auto walk = [&](auto&& value) {
      for (int64_t t = c.n * p / parts; t < c.n * (p + 1) / parts; ++t)
        for (int64_t i = row(t), end = row(t + 1); i < end; ++i)
          if (float v = value(i); !(positive && v <= 0)) take(t, c.indices[i], v);
    };
    if (plain)
      walk([plain](int64_t i) { return plain[i]; });
    else
      walk([&](int64_t i) { return value_at(c, i); });
  };
  parallel_for(parts, [&](int64_t p, int) {
    each(p, [count = next.data() + p * d_sae](int64_t, uint32_t j, float) { ++count[j]; });
  });
  int64_t place = 0;
  for (int64_t j = 0; j < d_sae; ++j) {
    starts_[j] = place;
    for (int64_t p = 0; p < parts; ++p) place += std::exchange(next[p * d_sae + j], place);
  }
  starts_[d_sae] = place;
  std::fill_n(rows_.get() + place, 4, 0u);  // rows to prefetch after the last
  parallel_for(parts, [&](int64_t p, int) {
    each(p, [&, to = next.data() + p * d_sae](int64_t t, uint32_t j, float v) {
      int64_t at = to[j]++;
      rows_[at] = static_cast<uint32_t>(t);
      values_[at] = v;
    });
  });
}

std::vector<int64_t> Grouped::ranges(int64_t parts, double per_feature) const {
  int64_t d_sae = static_cast<int64_t>(starts_.size()) - 1;
  double total = static_cast<double>(starts_[d_sae]) + per_feature * d_sae;
  std::vector<int64_t> cuts{0};
  for (int64_t p = 1; p < parts; ++p) {
    double goal = total * p / parts;
    int64_t lo = cuts.back(), hi = d_sae;
    while (lo < hi) {
      int64_t mid = (lo + hi) / 2;
      if (static_cast<double>(starts_[mid]) + per_feature * mid < goal)
        lo = mid + 1;
      else
        hi = mid;
    }
    cuts.push_back(lo);
  }
  cuts.push_back(d_sae);
  return cuts;
}

}  // namespace mlxsae::cpu
