#pragma once

#include "ops/common.h"

namespace mlxsae {

/** The shapes of a shadow and its columns: int8 has two bytes a weight, and six columns. */
inline std::vector<mx::Shape> shadow_shapes(const mx::Shape& w, mx::Dtype dtype) {
  return dtype == mx::int8 ? std::vector<mx::Shape>{{w[0], 2 * w[1]}, {6, w[0]}} : std::vector<mx::Shape>{w, {3, w[0]}};
}

/** Input w_enc (float32); outputs its shadow, bfloat16, int16 or int8, and the columns of the error bound. No
 * derivative is needed. */
class EncoderShadow : public FusedPrimitive {
 public:
  EncoderShadow(mx::Stream s, Graph graph, mx::Dtype dtype) : FusedPrimitive(s, std::move(graph)), dtype_(dtype) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  const char* name() const override { return "EncoderShadow"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return dtype_ == static_cast<const EncoderShadow&>(other).dtype_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return shadow_shapes(in[0].shape(), dtype_); }

 private:
  mx::Dtype dtype_;
};

/** Throws std::invalid_argument unless this is a shadow of w_enc by shape and type, for this device. */
void check_shadow(const char* op, const Shadow& shadow, const mx::array& w_enc, mx::Device device);

/** The type of shadow with which this processor screens fastest. */
mx::Dtype fastest_shadow();

}  // namespace mlxsae
