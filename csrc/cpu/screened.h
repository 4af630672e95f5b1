#pragma once
// The encoders' certified way: a product in 8 or 16 bits leaves candidates, whose float32 pre-activations follow one by
// one.

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/eval.h"

namespace mlxsae::cpu {

template <class T>
std::unique_ptr<T[]> room_for(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(n);
}

/** A float32 encoder with its shadow (ops/encoder_shadow.h), or with one that is made while it is used. */
struct Shadowed {
  const float *x, *w, *bias;
  const float* bounds;   // of each feature, which its pre-activation has to exceed; or null
  const uint16_t* w16;   // or null
  const float* columns;  // with w16
  ShadowType type;
  bool floats;  // whether x and w are float32
  int64_t n, d, d_sae;

  /** Where `shadow` is w16 and columns, or null. */
  static Shadowed of(const Rows& x, const Rows& w, const float* bias, const mx::array* shadow,
                     const float* bounds = nullptr);
  /**
   * Whether a screen for the k largest of each row is there, is worth its time, and has finite bounds, as far as is
   * known before.
   */
  bool usable(int64_t k) const;
};

/**
 * What the screen leaves of every token, sorted by feature: a feature's row then serves all its tokens. With k > 0 the
 * likeliest k of every token precede all others.
 */
class Candidates {
 public:
  /**
   * What may be among the k largest of its token; with k = 0, what may reach `floor`, of which `bounds` are taken off;
   * `room` candidates a token.
   */
  Candidates(const Shadowed& e, int64_t k, float floor, int64_t room);
  /** False: a bound is not finite, and nothing below means anything. */
  bool usable() const { return !unusable_; }

  int64_t size() const { return size_; }
  int64_t row(int64_t q) const { return rows_[q]; }
  uint32_t feature(int64_t q) const { return features_[q]; }
  /** Its place among all candidates in the order of (row, feature). */
  int64_t slot(int64_t q) const { return slots_[q]; }
  /** Candidates of token t have the slots [first(t), first(t + 1)); none where it is to be done in float32. */
  int64_t first(int64_t t) const { return first_[t]; }
  /** Ranges of tokens [first, second) that are to be done in float32. */
  const std::vector<std::pair<int64_t, int64_t>>& redo() const { return redo_; }
  /** So many, or so scattered, that all tokens had better be: each range reads all weights. */
  bool too_many_to_redo() const { return 8 * to_redo_ > e_.n || 64 * static_cast<int64_t>(redo_.size()) > e_.n; }

  /**
   * Fast pre-activations, in any order of additions, and how far each may be off. With k > 0 the likeliest are rescored
   * at once, as nearly all of them would be in the end, and what cannot reach the least of them is dropped.
   */
  void estimate();
  float sum(int64_t q) const { return sums_[q]; }
  float error(int64_t q) const;
  /** Keep those that stay(q) names. */
  template <class Stay>
  void keep(Stay&& stay) {
    auto stays = room_for<bool>(size_);
    parallel_ranges(size_, 4096, [&](int64_t a, int64_t b) {
      for (int64_t q = a; q < b; ++q) stays[q] = stay(q);
    });
    int64_t kept = 0, leading = 0;
    for (int64_t q = 0; q < size_; ++q) {
      rows_[kept] = rows_[q], features_[kept] = features_[q], slots_[kept] = slots_[q], sums_[kept] = sums_[q];
      leading += stays[q] && q < leading_;
      kept += stays[q];
    }
    leading_ = leading, size_ = kept;
  }
  /** Their pre-activations with the bits of the float32 encode kernel. */
  void rescore();

 private:
  void rescore(int64_t begin, int64_t end);

  Shadowed e_;
  int64_t size_ = 0, leading_ = 0;  // the leading ones have their sums
  int64_t to_redo_ = 0;             // tokens
  std::unique_ptr<uint32_t[]> rows_, features_, slots_;
  std::unique_ptr<float[]> sums_, norms_, upper_, made_;
  bool unusable_ = false;
  std::vector<int64_t> first_;
  std::vector<std::pair<int64_t, int64_t>> redo_;
};

}  // namespace mlxsae::cpu
