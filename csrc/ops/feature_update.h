#pragma once

#include "ops/common.h"

namespace mlxsae {

/**
 * Inputs: x, loss, then for each term residual, values, indices, scale, then w_enc, b_enc, w_dec, b_dec, their m, their
 * v[, shadow, columns]. Outputs: w_enc, b_enc, w_dec, b_dec, their m, their v, grad_norm[, shadow, columns].
 */
class FeatureUpdate : public FusedPrimitive {
 public:
  FeatureUpdate(mx::Stream s, Graph graph, int n_terms, UpdateOptions options)
      : FusedPrimitive(s, std::move(graph)), n_terms_(n_terms), options_(options) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override { no_derivative(); }
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override { no_derivative(); }
  const char* name() const override { return "FeatureUpdate"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override;

 private:
  [[noreturn]] static void no_derivative() { fail("feature_update", "an optimiser step has no derivative."); }
  int n_terms_;
  UpdateOptions options_;
};

}  // namespace mlxsae
