#include "ops/batch_topk_encode.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>

#include "cpu/hits.h"

namespace mlxsae {
namespace {

using cpu::Above;

// Keys order floats (cpu::order_key). Of values > 0 a key is the bits themselves.
constexpr int32_t kInfinity = 0x7f800000;

/** The bound that everything with at least this key exceeds, and nothing else that is > 0. */
float bound_below(int64_t key) {
  return std::bit_cast<float>(static_cast<int32_t>(std::clamp<int64_t>(key - 1, 0, kInfinity)));
}

/** Counts of the keys in [first, first + 2^(16 + shift)), 2^shift to a bin. */
struct Histogram {
  int64_t first = 0;
  int shift = 16;
  std::vector<int64_t> bins = std::vector<int64_t>(1 << 16, 0);

  void operator()(int64_t, int64_t, float value) {
    int64_t bin = (cpu::order_key(value) - first) >> shift;
    if (bin < static_cast<int64_t>(bins.size())) ++bins[bin];
  }
  /** The highest bin above which there are fewer than `rank`, with `above` that number; -1 where all are too few. */
  int64_t find(int64_t rank, int64_t& above) const {
    above = 0;
    for (int64_t b = static_cast<int64_t>(bins.size()) - 1; b >= 0; --b) {
      if (above + bins[b] >= rank) return b;
      above += bins[b];
    }
    return -1;
  }
};

Histogram histogram(Above e, int64_t first, int shift) {
  e.bound = bound_below(first);
  std::vector<Histogram> of(cpu::num_threads());
  for (auto& h : of) h.first = first, h.shift = shift;
  cpu::visit(e, false, [&](int64_t, int worker) -> Histogram& { return of[worker]; });
  for (size_t i = 1; i < of.size(); ++i)
    for (size_t b = 0; b < of[0].bins.size(); ++b) of[0].bins[b] += of[i].bins[b];
  return of[0];
}

/** A bound that the first sixteenth of the features puts near rank 1.5 * total. */
float bound_from_sample(Above e, int64_t total) {
  int64_t d_sae = e.f1;
  e.f1 = std::clamp<int64_t>(d_sae / 16, std::min<int64_t>(d_sae, 48), d_sae);
  double expected = static_cast<double>(total) * e.f1 / d_sae;
  int64_t above;
  int64_t bin = histogram(e, 0, 16).find(static_cast<int64_t>(1.5 * expected + 4 * std::sqrt(expected)) + 1, above);
  return bin < 0 ? 0.0f : bound_below(bin << 16);
}

/** Exactly the `total` largest, by counting: for what no guess thins out, such as many equal values. */
cpu::SortedHits collect_counted(Above e, int64_t total, int64_t most) {
  int64_t above, above_here;
  auto coarse = histogram(e, 0, 16);
  int64_t bin = coarse.find(total, above);
  e.bound = 0;  // not a guess's: where fewer than `total` are positive, all of them are kept
  if (bin >= 0) {
    auto fine = histogram(e, bin << 16, 0);
    int64_t key = (bin << 16) + fine.find(total - above, above_here);
    e.bound = bound_below(key);
    if (above + above_here + fine.bins[key & 0xffff] > most) {
      // More equal values at the edge than there is room for: each row's share of them is settled beforehand.
      std::vector<std::atomic<int32_t>> equal(e.x.n);
      auto counter = [&](int64_t row, int64_t, float v) {
        if (cpu::order_key(v) == key) equal[row].fetch_add(1, std::memory_order_relaxed);
      };
      cpu::visit(e, false, [&](int64_t, int) -> auto& { return counter; });
      int64_t rest = total - above - above_here;
      for (auto& m : equal) {
        m = static_cast<int32_t>(std::min<int64_t>(m, rest));
        rest -= m;
      }
      return *cpu::collect(e, total, [&](int64_t row, float v) { return cpu::order_key(v) > key || equal[row]-- > 0; });
    }
  }
  return *cpu::collect(e, std::max(most, total));
}

/**
 * At least the `total` largest by way of a screen; nothing where they are not all certain to exceed `bound`,
 * which is > 0.
 */
std::optional<cpu::SortedHits> collect_screened(Above e, const cpu::Shadowed& by, float bound, int64_t total) {
  int64_t n = e.x.n;
  cpu::Candidates found(by, 0, bound, std::min<int64_t>(16 * (total / n) + 64, e.w.n + 1));
  if (!found.usable() || found.too_many_to_redo()) return std::nullopt;
  e.bound = bound;
  auto redone = cpu::redo(e, found, 4 * total);
  if (!redone) return std::nullopt;
  int64_t m = found.size(), all = m + static_cast<int64_t>(redone->size());
  if (all < total) return std::nullopt;
  found.estimate();
  auto low = cpu::room_for<int32_t>(all);
  for (int64_t q = 0; q < m; ++q) low[q] = cpu::order_key(found.sum(q) - found.error(q));
  for (int64_t q = m; q < all; ++q) low[q] = cpu::order_key((*redone)[q - m].value);
  std::nth_element(low.get(), low.get() + total - 1, low.get() + all, std::greater<>());
  int32_t edge = low[total - 1];
  if (edge < cpu::order_key(bound)) return std::nullopt;  // what the screen left out might be among them
  found.keep([&](int64_t q) { return cpu::order_key(found.sum(q) + found.error(q)) >= edge; });
  found.rescore();

  return sorted_hits(found, *redone, n);
}

/** At least the `total` largest values > 0, or all of them. */
cpu::SortedHits candidates(Above e, const cpu::Shadowed& by, int64_t total, float hint) {
  int64_t most = std::max<int64_t>(4 * total, 1 << 16);
  auto attempt = [&](float bound) -> std::optional<cpu::SortedHits> {
    e.bound = bound;
    auto found = cpu::collect(e, most);
    if (found && bound > 0 && found->size() < total) return std::nullopt;  // it was too high
    return found;
  };
  if (hint > 0 && std::isfinite(hint) && total > 0) {
    if (by.usable((total + e.x.n - 1) / e.x.n))
      if (auto found = collect_screened(e, by, 0.95f * hint, total)) return std::move(*found);
    if (auto found = attempt(0.95f * hint)) return std::move(*found);
  }
  if (auto found = attempt(e.x.n * e.w.n <= most ? 0.0f : bound_from_sample(e, total))) return std::move(*found);
  return collect_counted(e, total, most);
}

}  // namespace

void BatchTopKEncode::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  auto e = cpu::above_of(inputs);
  auto by = cpu::Shadowed::of(e.x, e.w, e.bias, product_.certified ? &inputs[4] : nullptr);
  cpu::dispatch(
      stream(), inputs, outputs,
      [e, by, out = cpu::csr_out(outputs), hint = inputs[3].data<float>(), threshold = outputs[3].data<float>()] {
        auto found = candidates(e, by, out.room, *hint);
        int64_t m = found.size();
        // The key of the last one, and how many that are equal to it are kept.
        int32_t last = 0;
        int64_t equal = 0;
        if (m > out.room) {
          auto keys = std::make_unique_for_overwrite<int32_t[]>(m);
          for (int64_t i = 0; i < m; ++i) keys[i] = cpu::order_key(found.hits[i].value);
          std::nth_element(keys.get(), keys.get() + out.room - 1, keys.get() + m, std::greater<>());
          last = keys[out.room - 1];
          equal = out.room - std::count_if(keys.get(), keys.get() + m, [last](int32_t k) { return k > last; });
        }
        int32_t least = INT32_MAX;
        out.write(found, [&](const cpu::Hit& hit) {
          int32_t key = cpu::order_key(hit.value);
          if (key < last || (key == last && equal-- <= 0)) return false;
          least = std::min(least, key);
          return true;
        });
        *threshold = m == 0 || out.room == 0 ? 0.0f : std::bit_cast<float>(least);
      });
}

}  // namespace mlxsae
