#pragma once

#include "ops/adam.h"

namespace mlxsae {

/**
 * Inputs w, m, v, last_step, rows, and corrections [steps, 2]: step size and 1 / sqrt(1 - beta2^t) of the last steps.
 * Outputs w, m, v, last_step.
 */
class AdamCatchUp : public FusedPrimitive {
 public:
  AdamCatchUp(mx::Stream s, Graph graph, CatchUpOptions options)
      : FusedPrimitive(s, std::move(graph)), options_(std::move(options)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  gpu::Plan plan(const Arrays& inputs, const gpu::Device& device) override;
  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override { no_derivative(); }
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override { no_derivative(); }
  const char* name() const override { return "AdamCatchUp"; }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {in[0].shape(), in[1].shape(), in[2].shape(), in[3].shape()};
  }

 private:
  [[noreturn]] static void no_derivative() { fail("adam_catch_up", "an optimiser step has no derivative."); }
  CatchUpOptions options_;
};

}  // namespace mlxsae
