#pragma once
// Pre-activations above a bound, for the encoders whose rows vary in length.

#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/eval.h"
#include "cpu/screened.h"

namespace mlxsae::cpu {

/** The shares of a product: blocks of rows and, where these are fewer than the threads, ranges of features. */
class Shares {
 public:
  Shares(const Above& e, bool whole_rows);
  int64_t size() const { return blocks_ * parts_; }
  /** Shares come in order of their rows, those of the same rows in order of their features. */
  Above operator[](int64_t i) const;

 private:
  Above e_;
  int64_t blocks_, parts_;
};

/** Walks over the product of `e`: sink_of(share, worker) gives the object whose (row, feature, value) takes the hits.
 */
template <class SinkOf>
void visit(const Above& e, bool whole_rows, SinkOf&& sink_of) {
  Shares shares(e, whole_rows);
  parallel_for(shares.size(), [&](int64_t i, int worker) {
    auto& sink = sink_of(i, worker);
    using Sink = std::remove_reference_t<decltype(sink)>;
    Above share = shares[i];
    share.self = &sink;
    share.take = [](void* self, int64_t row, int64_t feature, float value) {
      (*static_cast<Sink*>(self))(row, feature, value);
    };
    kernels().above(share);
  });
}

struct Hit {
  uint32_t row, feature;
  float value;
};

/** Hits in the order of (row, feature); row t holds [starts[t], starts[t + 1]). */
struct SortedHits {
  std::vector<int64_t> starts;
  std::unique_ptr<Hit[]> hits;
  int64_t size() const { return starts.back(); }
};

/** Hits of the rows that a screen left to the float32 kernel, in order; nothing where they are clearly more than
 * `most`.
 */
std::optional<std::vector<Hit>> redo(Above e, const Candidates& found, int64_t most);
/** What a screen found of n rows, and those hits. */
SortedHits sorted_hits(const Candidates& found, const std::vector<Hit>& redone, int64_t n);

/** May this hit be kept? It is asked from several threads, but for one row in the order of the features. */
using Accept = std::function<bool(int64_t row, float value)>;

/** The hits of `e`, or nothing where there are clearly more than `most` (memory is O(most) in any case). */
std::optional<SortedHits> collect(const Above& e, int64_t most, const Accept& accept = nullptr);

/** An encoder's outputs in compressed rows. */
struct CsrOut {
  void* values;
  Type type;
  uint32_t* indices;
  int64_t* offsets;  // [n + 1]
  int64_t n, room;

  /** The hits that keep(hit) says, asked one after the other, until there is no more room; the rest is unused. */
  template <class Keep>
  void write(const SortedHits& from, Keep&& keep) const {
    int64_t i = 0;
    offsets[0] = 0;
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t q = from.starts[t]; q < from.starts[t + 1] && i < room; ++q)
        if (keep(from.hits[q])) put(i++, from.hits[q]);
      offsets[t + 1] = i;
    }
    for (; i < room; ++i) put(i, {0, 0, 0.0f});
  }

 private:
  void put(int64_t i, const Hit& hit) const {
    indices[i] = hit.feature;
    switch (type) {
      case Type::f32:
        static_cast<float*>(values)[i] = hit.value;
        break;
      case Type::f16:
        static_cast<mx::float16_t*>(values)[i] = static_cast<mx::float16_t>(hit.value);
        break;
      case Type::bf16:
        static_cast<mx::bfloat16_t*>(values)[i] = static_cast<mx::bfloat16_t>(hit.value);
        break;
    }
  }
};

/** The product that an encoder's inputs x, w_enc, b_enc name, over all rows and features, with bound 0. */
Above above_of(const Arrays& inputs);
CsrOut csr_out(Arrays& outputs);

}  // namespace mlxsae::cpu
