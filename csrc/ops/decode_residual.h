#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Inputs values, indices, w_dec, target[, b_dec][, offsets], floats all float32; outputs residual, square. Derivatives
 * by the graph. */
class DecodeResidual : public CodePrimitive {
 public:
  using CodePrimitive::CodePrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  const char* name() const override { return "DecodeResidual"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[3].shape(), {in[3].shape(0)}}; }
};

}  // namespace mlxsae
