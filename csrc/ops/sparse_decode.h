#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Inputs values, indices, w_dec[, b_dec][, offsets]. */
class SparseDecode : public CodePrimitive {
 public:
  using CodePrimitive::CodePrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays&, const std::vector<int>&) override;
  const char* name() const override { return "SparseDecode"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {{csr_ ? in.back().shape(0) - 1 : in[0].shape(0), in[2].shape(1)}};
  }
};

}  // namespace mlxsae
