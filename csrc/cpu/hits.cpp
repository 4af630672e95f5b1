#include "cpu/hits.h"

#include <algorithm>
#include <atomic>

namespace mlxsae::cpu {

Shares::Shares(const Above& e, bool whole_rows) : e_(e) {
  int64_t n = e.t1 - e.t0, features = e.f1 - e.f0, threads = num_threads(), tokens = kernels().token_block;
  int64_t block = std::max<int64_t>(tokens * 1024 / std::max<int64_t>(1024, e.x.d), tokens / 2);
  blocks_ = n > 0 && features > 0 ? (n + block - 1) / block : 0;
  parts_ = 1;
  if (blocks_ > 0 && blocks_ < threads && !whole_rows)
    parts_ = std::clamp<int64_t>(2 * threads / blocks_, 1, std::max<int64_t>(1, features / 256));
}

Above Shares::operator[](int64_t i) const {
  int64_t b = i / parts_, p = i % parts_, n = e_.t1 - e_.t0, features = e_.f1 - e_.f0;
  Above share = e_;
  share.t0 = e_.t0 + share_of_tokens(n, b, blocks_), share.t1 = e_.t0 + share_of_tokens(n, b + 1, blocks_);
  share.f0 = e_.f0 + features * p / parts_, share.f1 = e_.f0 + features * (p + 1) / parts_;
  return share;
}

namespace {

constexpr int64_t kGrant = 256;  // hits that a share may keep before it has to ask again

struct Keeper {
  const Accept* accept = nullptr;
  std::atomic<int64_t>* left = nullptr;
  std::vector<Hit> hits;
  int64_t granted = 0;

  void operator()(int64_t row, int64_t feature, float value) {
    if (*accept && !(*accept)(row, value)) return;
    if (granted == 0) {
      if (left->fetch_sub(kGrant, std::memory_order_relaxed) <= 0) return;  // and so for all that follow
      granted = kGrant;
    }
    --granted;
    hits.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(feature), value});
  }
};

}  // namespace

std::optional<SortedHits> collect(const Above& e, int64_t most, const Accept& accept) {
  bool whole_rows = accept != nullptr;
  int64_t shares = Shares(e, whole_rows).size();
  // Every share may leave a part of its last grant unused.
  std::atomic<int64_t> left{most + kGrant * shares};
  std::vector<Keeper> keepers(shares);
  for (auto& k : keepers) k.accept = &accept, k.left = &left;
  visit(e, whole_rows, [&](int64_t i, int) -> Keeper& { return keepers[i]; });
  if (left < 0) return std::nullopt;

  SortedHits out{std::vector<int64_t>(e.x.n + 2, 0), nullptr};
  // starts[t + 2] counts, then starts[t + 1] is where the next hit of row t goes, then where row t + 1 starts.
  for (auto& k : keepers)
    for (auto& hit : k.hits) ++out.starts[hit.row + 2];
  for (int64_t t = 2; t < e.x.n + 2; ++t) out.starts[t] += out.starts[t - 1];
  out.hits = std::make_unique_for_overwrite<Hit[]>(out.starts.back());
  for (auto& k : keepers) {
    for (auto& hit : k.hits) out.hits[out.starts[hit.row + 1]++] = hit;
    k.hits = {};
  }
  out.starts.pop_back();
  return out;
}

std::optional<std::vector<Hit>> redo(Above e, const Candidates& found, int64_t most) {
  std::vector<Hit> hits;
  for (auto [t0, t1] : found.redo()) {
    e.t0 = t0, e.t1 = t1;
    auto some = collect(e, most - static_cast<int64_t>(hits.size()));
    if (!some) return std::nullopt;
    hits.insert(hits.end(), some->hits.get(), some->hits.get() + some->size());
    if (static_cast<int64_t>(hits.size()) > most) return std::nullopt;
  }
  return hits;
}

SortedHits sorted_hits(const Candidates& found, const std::vector<Hit>& redone, int64_t n) {
  SortedHits out{std::vector<int64_t>(n + 1, 0), room_for<Hit>(found.size() + redone.size())};
  for (int64_t q = 0; q < found.size(); ++q) ++out.starts[found.row(q) + 1];
  for (auto& hit : redone) ++out.starts[hit.row + 1];
  for (int64_t t = 0; t < n; ++t) out.starts[t + 1] += out.starts[t];
  auto next = out.starts;
  for (auto& hit : redone) out.hits[next[hit.row]++] = hit;
  for (int64_t q = 0; q < found.size(); ++q)
    out.hits[next[found.row(q)]++] = {static_cast<uint32_t>(found.row(q)), found.feature(q), found.sum(q)};
  return out;
}

Above above_of(const Arrays& inputs) {
  Above e{};
  e.x = rows_of(inputs[0]);
  e.w = rows_of(inputs[1]);
  e.bias = inputs[2].data<float>();
  e.t1 = e.x.n;
  e.f1 = e.w.n;
  return e;
}

CsrOut csr_out(Arrays& outputs) {
  return {outputs[0].data<char>(),    type_of(outputs[0]),     outputs[1].data<uint32_t>(),
          outputs[2].data<int64_t>(), outputs[2].shape(0) - 1, outputs[0].shape(0)};
}

}  // namespace mlxsae::cpu
