#include "ops/threshold_encode.h"

#include <algorithm>
#include <atomic>

#include "cpu/hits.h"

namespace mlxsae {
namespace {

/** All that exceed their bounds, by way of a screen; nothing where it cannot tell, or where they are many. */
std::optional<cpu::SortedHits> collect_screened(const cpu::Above& e, int64_t room) {
  int64_t n = e.x.n, most = n ? room / n : 0;
  auto by = cpu::Shadowed::of(e.x, e.w, e.bias, nullptr, e.bounds);
  if (!by.usable(most / 4)) return std::nullopt;
  // Twice as many as are worth a screen on average.
  int64_t room_of_each = std::min(4 * most, 2 * e.w.n / (e.x.d < 1024 ? 128 : 64)) + 64;
  cpu::Candidates found(by, 0, 0, std::min(room_of_each, e.w.n + 1));
  if (!found.usable() || found.too_many_to_redo()) return std::nullopt;
  auto redone = cpu::redo(e, found, room);
  if (!redone) return std::nullopt;
  found.rescore();
  found.keep([&](int64_t q) { return found.sum(q) > e.bounds[found.feature(q)]; });
  return cpu::sorted_hits(found, *redone, n);
}

}  // namespace

void ThresholdEncode::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  auto e = cpu::above_of(inputs);
  e.bounds = inputs[3].data<float>();
  cpu::dispatch(stream(), inputs, outputs, [e, out = cpu::csr_out(outputs), count = outputs[3].data<int64_t>()] {
    auto all = [](const cpu::Hit&) { return true; };
    if (auto found = collect_screened(e, out.room)) {
      *count = found->size();
      return out.write(*found, all);
    }
    if (auto found = cpu::collect(e, out.room)) {
      *count = found->size();
      return out.write(*found, all);
    }
    // Too many. Their number in each row tells which are the first.
    std::vector<std::atomic<int32_t>> in_row(out.n);
    auto counter = [&](int64_t row, int64_t, float) { in_row[row].fetch_add(1, std::memory_order_relaxed); };
    cpu::visit(e, false, [&](int64_t, int) -> auto& { return counter; });
    *count = 0;
    for (auto& m : in_row) {
      int64_t rest = std::max<int64_t>(0, out.room - *count);
      *count += m;
      m = static_cast<int32_t>(std::min<int64_t>(m, rest));
    }
    out.write(*cpu::collect(e, out.room, [&](int64_t row, float) { return in_row[row]-- > 0; }), all);
  });
}

}  // namespace mlxsae
