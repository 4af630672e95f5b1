#pragma once

#include <algorithm>

#include "ops/adam.h"

namespace mlxsae {

/**
 * Inputs: x, loss, then for each term residual, values, indices, scale, then the offsets of the terms whose code is in
 * compressed rows, then w_enc, b_enc, w_dec, b_dec, their m, their v[, shadow, columns]. Outputs: w_enc, b_enc, w_dec,
 * b_dec, their m, their v, grad_norm[, shadow, columns].
 */
class FeatureUpdate : public FusedPrimitive {
 public:
  FeatureUpdate(mx::Stream s, Graph graph, std::vector<bool> csr, UpdateOptions options)
      : FusedPrimitive(s, std::move(graph)), csr_(std::move(csr)), options_(options) {}

  /** Where term q's offsets stand among the inputs; q = the number of terms: where the parameters begin. */
  static size_t place_of_offsets(const std::vector<bool>& csr, size_t q) {
    return 2 + 4 * csr.size() + std::count(csr.begin(), csr.begin() + q, true);
  }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override { no_derivative(); }
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override { no_derivative(); }
  const char* name() const override { return "FeatureUpdate"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 private:
  [[noreturn]] static void no_derivative() { fail("feature_update", "an optimiser step has no derivative."); }
  std::vector<bool> csr_;  // for each term, whether it has offsets
  UpdateOptions options_;
};

}  // namespace mlxsae
