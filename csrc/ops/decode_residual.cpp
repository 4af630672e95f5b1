#include "ops/decode_residual.h"

namespace mlxsae {
namespace {

Arrays graph(const Arrays& in, mx::Stream s) {
  std::optional<mx::array> bias;
  if (in.size() > 4) bias = in[4];
  auto x_hat = mx::astype(sparse_decode(in[0], in[1], in[2], bias, s), mx::float32, s);
  auto residual = mx::subtract(x_hat, mx::astype(in[3], mx::float32, s), s);
  return {residual, mx::sum(mx::square(residual, s), 1, false, s)};
}

}  // namespace

std::pair<mx::array, mx::array> decode_residual(const mx::array& values, const mx::array& indices,
                                                const mx::array& w_dec, const mx::array& target,
                                                const std::optional<mx::array>& b_dec, mx::StreamOrDevice s_) {
  const char* op = "decode_residual";
  auto s = mx::to_stream(s_);
  auto ids = check_code(op, &values, indices, s);
  check_matrix(op, "w_dec", w_dec);
  check_matrix(op, "target", target);
  if (target.shape(0) != values.shape(0) || target.shape(1) != w_dec.shape(1))
    fail(op, "target must have shape [n, d_out] = [", values.shape(0), ", ", w_dec.shape(1), "] but got ",
         target.shape(), ".");
  if (b_dec) check_vector(op, "b_dec", *b_dec, w_dec.shape(1), "d_out");
  Arrays inputs{values, ids, w_dec, target};
  if (b_dec) inputs.push_back(*b_dec);
  bool all_float32 = true;
  for (size_t i = 0; i < inputs.size(); ++i) all_float32 &= i == 1 || inputs[i].dtype() == mx::float32;
  auto define = [s](const Arrays& in) { return graph(in, s); };
  if (!has_kernel(op, s.device) || !all_float32) {
    auto out = define(inputs);
    return {out[0], out[1]};
  }
  for (auto& a : inputs) a = normal(a, s);
  auto out = mx::array::make_arrays({target.shape(), {target.shape(0)}}, {mx::float32, mx::float32},
                                    std::make_shared<DecodeResidual>(s, define), inputs);
  return {out[0], out[1]};
}

}  // namespace mlxsae
