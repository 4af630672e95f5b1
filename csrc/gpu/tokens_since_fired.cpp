#include "gpu/tokens_since_fired.h"

namespace mlxsae::gpu {

Plan tokens_since_fired(const CodeSize& code, int64_t d_sae, int32_t n_tokens) {
  constexpr int64_t threads = 256;
  const char* library = "tokens_since_fired";
  Plan plan;
  int counts = plan.input("counts", Type::i32, d_sae);
  CodeBuffers in{code, plan.input("values", code.type, code.room), plan.input("indices", Type::u32, code.room), -1};
  if (code.compressed) in.offsets = plan.input("offsets", Type::i64, code.n + 1);
  int out = plan.output("out", Type::i32, d_sae, counts);
  if (d_sae == 0) return plan;
  plan.launch(library, "tokens_age", {ceil_div(d_sae, threads)}, {threads})
      .read(0, counts)
      .write(1, out)
      .argument(2, static_cast<uint32_t>(d_sae))
      .argument(3, n_tokens);
  if (code.room == 0) return plan;
  read_code(plan.launch(library, "tokens_fired", {ceil_div(code.room, threads)}, {threads}), 0, in)
      .write(3, out)
      .argument(4, static_cast<uint32_t>(code.n))
      .argument(5, code.slots())
      .argument(6, code.room)
      .argument(7, static_cast<uint32_t>(code.type))
      .argument(8, static_cast<uint32_t>(d_sae));
  return plan;
}

}  // namespace mlxsae::gpu
