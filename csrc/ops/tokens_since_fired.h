#pragma once

#include "ops/common.h"

namespace mlxsae {

/** Inputs tokens_since_fired, values, indices. A count: it has no derivative. */
class TokensSinceFired : public FusedPrimitive {
 public:
  TokensSinceFired(mx::Stream s, Graph graph, int n_tokens)
      : FusedPrimitive(s, std::move(graph)), n_tokens_(n_tokens) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  const char* name() const override { return "TokensSinceFired"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return static_cast<const TokensSinceFired&>(other).n_tokens_ == n_tokens_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }

 private:
  int n_tokens_;
};

}  // namespace mlxsae
