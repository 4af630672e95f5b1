#pragma once

#include "ops/csr_encode.h"

namespace mlxsae {

/** Inputs x, w_enc, b_enc (float32), bounds [d_sae] (float32, not negative); outputs values, indices, offsets, count.
 */
class ThresholdEncode : public CsrEncode {
 public:
  ThresholdEncode(mx::Stream s, Graph graph, int capacity) : CsrEncode(s, std::move(graph)), capacity_(capacity) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  const char* name() const override { return "ThresholdEncode"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return static_cast<const ThresholdEncode&>(other).capacity_ == capacity_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {{capacity_}, {capacity_}, {in[0].shape(0) + 1}, {}};
  }

 protected:
  Arrays again(const Arrays& inputs) override;

 private:
  int capacity_;
};

}  // namespace mlxsae
