#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Input w_enc (float32); outputs its bfloat16 shadow and the columns of the error bound. No derivative is needed. */
class EncoderShadow : public FusedPrimitive {
 public:
  using FusedPrimitive::FusedPrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  const char* name() const override { return "EncoderShadow"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape(), {3, in[0].shape(0)}}; }
};

/** Throws std::invalid_argument unless this is a shadow of w_enc by shape and type. */
void check_shadow(const char* op, const Shadow& shadow, const mx::array& w_enc);

}  // namespace mlxsae
