#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Inputs rows, weight, indices[, offsets]. */
class GatherDot : public CodePrimitive {
 public:
  using CodePrimitive::CodePrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays&, const std::vector<int>&) override;
  const char* name() const override { return "GatherDot"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[2].shape()}; }
};

}  // namespace mlxsae
