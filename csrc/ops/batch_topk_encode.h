#pragma once

#include "ops/csr_encode.h"
#include "ops/selection.h"

namespace mlxsae {

/** Inputs x, w_enc, b_enc (float32), hint (float32, one number)[, shadow, columns]; outputs values, indices, offsets,
 * threshold. */
class BatchTopKEncode : public CsrEncode {
 public:
  BatchTopKEncode(mx::Stream s, Graph graph, int k, Product product)
      : CsrEncode(s, std::move(graph)), k_(k), product_(product) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  const char* name() const override { return "BatchTopKEncode"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& o = static_cast<const BatchTopKEncode&>(other);
    return o.k_ == k_ && o.product_ == product_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    int n = in[0].shape(0);
    return {{k_ * n}, {k_ * n}, {n + 1}, {}};
  }

 protected:
  Arrays again(const Arrays& inputs) override;

 private:
  int k_;
  Product product_;
};

}  // namespace mlxsae
