#pragma once
// Codes that use few features often: the auxiliary code of dead features has a row of every third token, so that the
// walk over its entries loads the same rows again and again. The code as a matrix over these features and dense
// products are several times faster there. Results are those of the walks but for rounding, whatever the number of
// threads: block sizes follow from the shapes alone.

#include "cpu/eval.h"

namespace mlxsae::cpu {

/**
 * Is a dense product cheaper than a walk over the entries, for a code of n rows that uses so many features? A product
 * costs n * features at every width, a walk about four times as much an entry; packing wants many features to serve.
 */
inline bool dense_pays(int64_t n, int64_t features, int64_t entries) {
  return n >= 16 && features >= 32 && 4 * entries >= n * features;
}

/** Memory that a thread keeps from one step to the next, on large pages. */
class Workspace {
 public:
  /** Room for so many floats on a cache line; what was handed out before is gone. */
  float* get(int64_t floats);
  ~Workspace();

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

/** That of the calling thread, for one op at a time. */
Workspace& workspace();

/** residual = code @ w + bias - target, square[t] = |residual[t]|^2, where a dense product pays; else false. */
bool dense_residual(const Code& code, const float* w, const float* bias, const float* target, int64_t d_sae, int64_t d,
                    float* residual, float* square);

/** Which features of an update are taken apart from the walk, and the terms in which they are dense. */
class DenseTerms {
 public:
  /** x [n, d_in] as in Update. */
  DenseTerms(const std::vector<Term>& terms, const float* x, int64_t n, int64_t d_in, int64_t d_out, int64_t d_sae);
  bool any() const { return !features_.empty(); }
  /** [d_sae], for Update. */
  const uint8_t* apart() const { return any() ? apart_.data() : nullptr; }
  /** Ranges of features that sum up by themselves (through_input, square). */
  int64_t parts() const { return parts_of(static_cast<int64_t>(features_.size())); }
  /** Gradients of these features, then finish(u of part i) on each range. */
  void update(const Update& u, int64_t n, const std::function<Update(int64_t part)>& of_part) const;

 private:
  static constexpr int64_t kPart = 32;
  static int64_t parts_of(int64_t features) { return (features + kPart - 1) / kPart; }
  /** The term's gradients over the tokens [t0, t1) are added to `rows`. */
  void add(const Update& u, const Term& term, int64_t t0, int64_t t1, const Apart& rows, float* memory) const;
  std::vector<Term> sparse_, dense_;
  std::vector<uint32_t> features_;
  std::vector<uint8_t> apart_;
};

}  // namespace mlxsae::cpu
