#include "ops/decode_residual.h"

#include "gpu/sparse_decode.h"

namespace mlxsae {
namespace {

Arrays decode_residual_graph(const Arrays& in, bool csr, mx::Stream s) {
  std::optional<mx::array> bias, offsets;
  if (in.size() > 4u + csr) bias = in[4];
  if (csr) offsets = in.back();
  auto x_hat = mx::astype(sparse_decode(in[0], in[1], in[2], bias, offsets, s), mx::float32, s);
  auto residual = mx::subtract(x_hat, mx::astype(in[3], mx::float32, s), s);
  return {residual, mx::sum(mx::square(residual, s), 1, false, s)};
}

}  // namespace

std::pair<mx::array, mx::array> decode_residual(const mx::array& values, const mx::array& indices,
                                                const mx::array& w_dec, const mx::array& target,
                                                const std::optional<mx::array>& b_dec,
                                                const std::optional<mx::array>& offsets, mx::StreamOrDevice s_) {
  const char* op = "decode_residual";
  auto s = mx::to_stream(s_);
  auto code = check_code(op, &values, indices, offsets, s);
  check_matrix(op, "w_dec", w_dec);
  check_matrix(op, "target", target);
  if (target.shape(0) != code.n || target.shape(1) != w_dec.shape(1))
    fail(op, "target must have shape [n, d_out] = [", code.n, ", ", w_dec.shape(1), "] but got ", target.shape(), ".");
  if (b_dec) check_vector(op, "b_dec", *b_dec, w_dec.shape(1), "d_out");
  Arrays inputs{values, code.indices, w_dec, target};
  if (b_dec) inputs.push_back(*b_dec);
  bool all_float32 = true;
  for (size_t i = 0; i < inputs.size(); ++i) all_float32 &= i == 1 || inputs[i].dtype() == mx::float32;
  bool csr = offsets.has_value();
  if (csr) inputs.push_back(*code.offsets);
  auto define = [s, csr](const Arrays& in) { return decode_residual_graph(in, csr, s); };
  if (!has_kernel(op, s.device) || !all_float32) {
    auto out = define(inputs);
    return {out[0], out[1]};
  }
  for (auto& a : inputs) a = normal(a, s);
  auto out = mx::array::make_arrays({target.shape(), {target.shape(0)}}, {mx::float32, mx::float32},
                                    std::make_shared<DecodeResidual>(s, define, csr), inputs);
  return {out[0], out[1]};
}

gpu::Plan DecodeResidual::plan(const Arrays& in, const gpu::Device&) {
  auto bias = optional(in, 4);
  bool aligned = aligned_rows(in[2]) && aligned_rows(in[3]) && (!bias || aligned_rows(*bias));
  return gpu::decode_residual(code_size(in[1], offsets_of(in)), in[2].shape(1), in[2].shape(0), bias.has_value(),
                              aligned);
}

}  // namespace mlxsae
