#include "ops/threshold_encode.h"

#include <atomic>

#include "cpu/hits.h"

namespace mlxsae {

void ThresholdEncode::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  auto e = cpu::above_of(inputs);
  e.bounds = inputs[3].data<float>();
  cpu::dispatch(stream(), inputs, outputs, [e, out = cpu::csr_out(outputs), count = outputs[3].data<int64_t>()] {
    auto all = [](const cpu::Hit&) { return true; };
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
