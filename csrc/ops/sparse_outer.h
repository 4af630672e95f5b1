#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Inputs values, indices, rows[, offsets]. */
class SparseOuter : public CodePrimitive {
 public:
  SparseOuter(mx::Stream s, Graph graph, bool csr, int d_sae)
      : CodePrimitive(s, std::move(graph), csr), d_sae_(d_sae) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays&, const std::vector<int>&) override;
  const char* name() const override { return "SparseOuter"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return CodePrimitive::is_equivalent(other) && static_cast<const SparseOuter&>(other).d_sae_ == d_sae_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {{d_sae_, in[2].shape(1)}}; }

 private:
  int d_sae_;
};

}  // namespace mlxsae
