#include "cpu/screened.h"

#include <cmath>
#include <utility>

namespace mlxsae::cpu {

Shadowed Shadowed::of(const Rows& x, const Rows& w, const float* bias, const mx::array* shadow, const float* bounds) {
  return {static_cast<const float*>(x.data),
          static_cast<const float*>(w.data),
          bias,
          bounds,
          shadow ? shadow[0].data<uint16_t>() : nullptr,
          shadow ? shadow[1].data<float>() : nullptr,
          shadow ? shadow_type_of(shadow[0]) : kernels().shadow_type,
          x.type == Type::f32 && w.type == Type::f32,
          x.n,
          x.d,
          w.n};
}

namespace {

auto screen_of(ShadowType type) { return kernels().screen[static_cast<int>(type)]; }

/** Sorts ids, and `upper` (or null) with them. */
void ascend(int32_t* ids, float* upper, int64_t n) {
  if (n <= 256) {
    for (int64_t i = 1; i < n; ++i) {
      int32_t id = ids[i];
      float up = upper ? upper[i] : 0;
      int64_t q = i;
      for (; q > 0 && ids[q - 1] > id; --q) {
        ids[q] = ids[q - 1];
        if (upper) upper[q] = upper[q - 1];
      }
      ids[q] = id;
      if (upper) upper[q] = up;
    }
    return;
  }
  std::vector<std::pair<int32_t, float>> both(n);
  for (int64_t i = 0; i < n; ++i) both[i] = {ids[i], upper ? upper[i] : 0};
  std::sort(both.begin(), both.end(), [](auto& a, auto& b) { return a.first < b.first; });
  for (int64_t i = 0; i < n; ++i) {
    ids[i] = both[i].first;
    if (upper) upper[i] = both[i].second;
  }
}

}  // namespace

bool Shadowed::usable(int64_t k) const {
  if (!floats || !screen_of(type) || d_sae >= INT32_MAX / 2) return false;
  // Few tokens are bound by reading the weights once; and a width or a k that the screen cannot thin out gains nothing.
  if (n < 32 || 4 * k > d_sae) return false;
  // Measured (benchmarks/bench_topk_encode.py): what making the shadow and deciding k of every token take in return.
  if (!w16 &&
      (n < std::max(128, 64 * num_threads()) || d < kernels().making_width || (d < 1024 ? 128 : 64) * k > d_sae))
    return false;
  // Not NaN, and no sum of it overflows; but a bound that nothing exceeds serves as well.
  auto small = [](float v) { return std::fabs(v) < 1e18f; };
  auto all = [](const float* v, int64_t m, auto&& fit) { return !v || std::all_of(v, v + m, fit); };
  return (!w16 || all(columns, (type == ShadowType::i8 ? 6 : 3) * d_sae, small)) && all(bias, d_sae, small) &&
         all(bounds, d_sae, [&](float v) { return small(v) || v == INFINITY; });
}

Candidates::Candidates(const Shadowed& e, int64_t k, float floor, int64_t room) : e_(e) {
  int64_t n = e.n, d_sae = e.d_sae;
  auto counts = room_for<int32_t>(n);
  norms_ = room_for<float>(n);
  if (!e.w16) made_ = room_for<float>(3 * d_sae), e_.columns = made_.get();
  int64_t block =
      int64_t{e.w16 ? kernels().screen_block : kernels().making_block} * 1024 / std::max<int64_t>(1024, e.d);
  block = std::clamp<int64_t>(block, 64, std::max<int64_t>(64, n / num_threads()));
  int64_t blocks = (n + block - 1) / block;
  // What a task finds lies in its room only until the task ends.
  struct Found {
    std::vector<int32_t> ids;
    std::vector<float> upper;
  };
  std::vector<Found> parts_found(blocks);
  auto first_of = [&](int64_t i) { return std::min(n, (n + 63) / 64 * i / blocks * 64); };
  parallel_for(blocks, [&](int64_t i, int) {
    int64_t t0 = first_of(i), m = first_of(i + 1) - t0;
    auto ids = room_for<int32_t>(m * room);
    auto upper = room_for<float>(k > 0 ? m * room : 0);
    screen_of(e.type)({e.x + t0 * e.d, e.d, d_sae, k, room, floor, e.w16, e.columns, e.w, made_.get(), &unusable_,
                       e.bias, e.bounds, 0, m, ids.get(), upper.get(), counts.get() + t0, norms_.get() + t0});
    auto& to = parts_found[i];
    for (int64_t t = 0; t < m; ++t) {
      int64_t found = std::max(0, counts[t0 + t]);
      ascend(&ids[t * room], k > 0 ? &upper[t * room] : nullptr, found);
      to.ids.insert(to.ids.end(), &ids[t * room], &ids[t * room] + found);
      if (k > 0) to.upper.insert(to.upper.end(), &upper[t * room], &upper[t * room] + found);
    }
  });
  if (unusable_) return;

  first_.assign(n + 1, 0);
  for (int64_t t = 0; t < n; ++t) {
    if (counts[t] < 0) {
      ++to_redo_;
      if (redo_.empty() || redo_.back().second < t) redo_.emplace_back(t, t);
      redo_.back().second = t + 1;
    }
    first_[t + 1] = first_[t] + std::max(0, counts[t]);
  }
  size_ = first_[n];
  auto ids = room_for<int32_t>(size_);
  auto upper = room_for<float>(k > 0 ? size_ : 0);
  for (int64_t i = 0; i < blocks; ++i) {
    int64_t at = first_[first_of(i)];
    std::copy(parts_found[i].ids.begin(), parts_found[i].ids.end(), ids.get() + at);
    std::copy(parts_found[i].upper.begin(), parts_found[i].upper.end(), upper.get() + at);
    parts_found[i] = {};
  }
  rows_ = room_for<uint32_t>(size_), features_ = room_for<uint32_t>(size_), slots_ = room_for<uint32_t>(size_);
  sums_ = room_for<float>(size_), upper_ = room_for<float>(k > 0 ? size_ : 0);
  // A counting sort, as Grouped's: the parts of the rows have places of their own in every feature.
  int64_t parts = std::clamp<int64_t>(size_ >> 14, 1, std::min(num_threads(), 8)), bins = (k > 0 ? 2 : 1) * d_sae;
  std::vector<int64_t> next(parts * bins, 0);
  auto each = [&](int64_t p, auto&& take) {
    for (int64_t t = n * p / parts; t < n * (p + 1) / parts; ++t)
      for (int32_t i = 0; i < counts[t]; ++i) {
        int64_t slot = first_[t] + i;
        take(t, ids[slot], k > 0 && upper[slot] < INFINITY ? ids[slot] + d_sae : ids[slot], slot);
      }
  };
  parallel_for(parts, [&](int64_t p, int) {
    each(p, [count = next.data() + p * bins](int64_t, int32_t, int64_t bin, int64_t) { ++count[bin]; });
  });
  int64_t place = 0;
  for (int64_t j = 0; j < bins; ++j) {
    for (int64_t p = 0; p < parts; ++p) place += std::exchange(next[p * bins + j], place);
    if (k > 0 && j + 1 == d_sae) leading_ = place;
  }
  parallel_for(parts, [&](int64_t p, int) {
    each(p, [&, to = next.data() + p * bins](int64_t t, int32_t f, int64_t bin, int64_t slot) {
      int64_t q = to[bin]++;
      if (k > 0) upper_[q] = upper[slot];
      rows_[q] = static_cast<uint32_t>(t), features_[q] = static_cast<uint32_t>(f);
      slots_[q] = static_cast<uint32_t>(slot);
    });
  });
}

float Candidates::error(int64_t q) const {
  if (q < leading_) return 0;
  float gamma = 2 * static_cast<float>(e_.d + 16) * 5.97e-8f, norm = norms_[rows_[q]];
  const float* column = e_.columns + features_[q];
  return 1.0001f * gamma * norm * column[0] + column[2 * e_.d_sae] + 4e-38f * static_cast<float>(e_.d) * norm +
         2.4e-7f * std::fabs(e_.bias[features_[q]]);
}

namespace {

/** Ranges of [begin, end) in whole groups of eight. */
template <class Do>
void each(int64_t begin, int64_t end, Do&& f) {
  parallel_ranges((end - begin + 7) / 8, 64,
                  [&](int64_t a, int64_t b) { f(begin + a * 8, std::min(end, begin + b * 8)); });
}

}  // namespace

void Candidates::estimate() {
  rescore(0, leading_);
  if (leading_ > 0) {
    std::vector<float> bound(e_.n, INFINITY);
    for (int64_t q = 0; q < leading_; ++q) bound[rows_[q]] = std::min(bound[rows_[q]], sums_[q]);
    int64_t kept = leading_;
    for (int64_t q = leading_; q < size_; ++q) {
      rows_[kept] = rows_[q], features_[kept] = features_[q], slots_[kept] = slots_[q];
      kept += upper_[q] >= bound[rows_[q]];
    }
    size_ = kept;
  }
  Rescore r{e_.x, e_.w, e_.bias, e_.d, rows_.get(), features_.get(), sums_.get()};
  each(leading_, size_, [&](int64_t a, int64_t b) { kernels().estimate(r, a, b); });
}

void Candidates::rescore(int64_t begin, int64_t end) {
  Rescore r{e_.x, e_.w, e_.bias, e_.d, rows_.get(), features_.get(), sums_.get()};
  each(begin, end, [&](int64_t a, int64_t b) { kernels().rescore(r, a, b); });
}

void Candidates::rescore() { rescore(leading_, size_); }

}  // namespace mlxsae::cpu
