#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Inputs x, w_enc[, b_enc]; outputs values, indices. */
class TopKEncode : public FusedPrimitive {
 public:
  TopKEncode(mx::Stream s, Graph graph, int k) : FusedPrimitive(s, std::move(graph)), k_(k) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays&, const std::vector<int>&) override;
  const char* name() const override { return "TopKEncode"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return static_cast<const TopKEncode&>(other).k_ == k_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    mx::Shape shape{in[0].shape(0), k_};
    return {shape, shape};
  }

 private:
  int k_;
};

}  // namespace mlxsae
