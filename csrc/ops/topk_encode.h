#pragma once

#include "ops/selection.h"

namespace mlxsae {

/** Inputs x, w_enc, b_enc (float32)[, mask][, shadow, columns]; outputs values, indices[, values and indices of the
 * masked]. */
class TopKEncode : public FusedPrimitive {
 public:
  TopKEncode(mx::Stream s, Graph graph, int k, int k_aux, Product product)
      : FusedPrimitive(s, std::move(graph)), k_(k), k_aux_(k_aux), product_(product) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays&, const std::vector<int>&) override;
  const char* name() const override { return "TopKEncode"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const TopKEncode&>(other);
    return o.k_ == k_ && o.k_aux_ == k_aux_ && o.product_ == product_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    mx::Shape shape{in[0].shape(0), k_}, aux{in[0].shape(0), k_aux_};
    return k_aux_ ? std::vector<mx::Shape>{shape, shape, aux, aux} : std::vector<mx::Shape>{shape, shape};
  }

 private:
  /** The op on other rows with this primitive's options. */
  Arrays again(const mx::array& x, const Arrays& inputs);

  int k_, k_aux_;  // k_aux_ is 0 without a mask
  Product product_;
};

}  // namespace mlxsae
