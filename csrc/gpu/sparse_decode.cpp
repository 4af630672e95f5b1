#include "gpu/sparse_decode.h"

#include <algorithm>

namespace mlxsae::gpu {

namespace {

/** A row for a threadgroup, for each of its simdgroups a block of columns. */
Size threads_of_row(int64_t d, bool aligned) {
  constexpr int64_t pieces = 4;  // kDecodeUnroll of metal/sparse_decode.h
  return {kSimd * std::clamp<int64_t>(ceil_div(d, pieces * kSimd * lanes(aligned)), 1, 16)};
}

}  // namespace

Plan sparse_decode(const CodeSize& code, int64_t d, int64_t d_sae, Type w, std::optional<Type> bias, bool aligned) {
  Plan plan;
  CodeBuffers in{code, plan.input("values", code.type, code.room), plan.input("indices", Type::u32, code.room), -1};
  int weights = plan.input("w", w, d_sae * d);
  int bias_row = bias ? plan.input("bias", *bias, d) : -1;
  if (code.compressed) in.offsets = plan.input("offsets", Type::i64, code.n + 1);
  Type type = promoted(code.type, w);
  int out = plan.output("out", type, code.n * d);
  if (code.n * d == 0) return plan;
  plan.launch("sparse_decode", kernel_name("sparse_decode", w, aligned), {code.n}, threads_of_row(d, aligned))
      .read(0, in.values)
      .read(1, in.indices)
      .read(2, weights)
      .read(3, bias_row)
      .read(4, in.offsets)
      .write(5, out)
      .argument(6, static_cast<uint32_t>(d))
      .argument(7, static_cast<uint32_t>(d_sae))
      .argument(8, code.slots())
      .argument(9, code.room)
      .argument(10, static_cast<uint32_t>(code.type))
      .argument(11, static_cast<uint32_t>(bias.value_or(Type::f32)))
      .argument(12, static_cast<uint32_t>(type))
      .argument(13, bias.has_value());
  return plan;
}

Plan decode_residual(const CodeSize& code, int64_t d, int64_t d_sae, bool bias, bool aligned) {
  Plan plan;
  CodeBuffers in{code, plan.input("values", Type::f32, code.room), plan.input("indices", Type::u32, code.room), -1};
  int weights = plan.input("w", Type::f32, d_sae * d), target = plan.input("target", Type::f32, code.n * d);
  int bias_row = bias ? plan.input("bias", Type::f32, d) : -1;
  if (code.compressed) in.offsets = plan.input("offsets", Type::i64, code.n + 1);
  int residual = plan.output("residual", Type::f32, code.n * d), square = plan.output("square", Type::f32, code.n);
  if (code.n == 0) return plan;
  plan.launch("sparse_decode", kernel_name("decode_residual", std::nullopt, aligned), {code.n},
              threads_of_row(d, aligned))
      .read(0, in.values)
      .read(1, in.indices)
      .read(2, weights)
      .read(3, bias_row)
      .read(4, in.offsets)
      .write(5, residual)
      .argument(6, static_cast<uint32_t>(d))
      .argument(7, static_cast<uint32_t>(d_sae))
      .argument(8, code.slots())
      .argument(9, code.room)
      .argument(13, bias)
      .read(14, target)
      .write(15, square);
  return plan;
}

}  // namespace mlxsae::gpu
