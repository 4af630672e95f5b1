#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Inputs tokens_since_fired, values, indices[, offsets]. A count: it has no derivative. */
class TokensSinceFired : public CodePrimitive {
 public:
  TokensSinceFired(mx::Stream s, Graph graph, bool csr, int n_tokens)
      : CodePrimitive(s, std::move(graph), csr), n_tokens_(n_tokens) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  const char* name() const override { return "TokensSinceFired"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return CodePrimitive::is_equivalent(other) && static_cast<const TokensSinceFired&>(other).n_tokens_ == n_tokens_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }

 private:
  int n_tokens_;
};

}  // namespace mlxsae
