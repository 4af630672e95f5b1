#include "ops/sparse_decode.h"

#include "ops/slots.h"

namespace mlxsae {
namespace {

Arrays graph(const Arrays& in, mx::Stream s) {
  const auto &values = in[0], &indices = in[1], &w = in[2];
  auto type = mx::promote_types(values.dtype(), w.dtype());
  int n = values.shape(0), d = w.shape(1);
  auto out = in.size() > 3 ? mx::broadcast_to(mx::astype(in[3], mx::float32, s), {n, d}, s)
                           : mx::zeros({n, d}, mx::float32, s);
  for (auto [begin, end] : slot_chunks(values.shape(1), n, d)) {
    auto v = mx::expand_dims(mx::astype(columns(values, begin, end, s), mx::float32, s), 2, s);
    auto rows = mx::astype(mx::take(w, columns(indices, begin, end, s), 0, s), mx::float32, s);
    auto used = mx::not_equal(v, mx::array(0.0f), s);  // an unused slot adds nothing, whatever its row holds
    out = mx::add(out, mx::sum(mx::where(used, mx::multiply(v, rows, s), mx::array(0.0f), s), 1, false, s), s);
  }
  return {mx::astype(out, type, s)};
}

}  // namespace

mx::array sparse_decode(const mx::array& values, const mx::array& indices, const mx::array& w_dec,
                        const std::optional<mx::array>& b_dec, mx::StreamOrDevice s_) {
  const char* op = "sparse_decode";
  auto s = mx::to_stream(s_);
  auto ids = check_code(op, &values, indices, s);
  check_matrix(op, "w_dec", w_dec);
  if (w_dec.shape(0) == 0 && indices.size() > 0)
    fail(op, "w_dec must have at least one feature but got ", w_dec.shape(), ".");
  if (b_dec) check_vector(op, "b_dec", *b_dec, w_dec.shape(1), "d_out");
  auto define = [s](const Arrays& in) { return graph(in, s); };
  Arrays inputs{values, ids, w_dec};
  if (b_dec) inputs.push_back(*b_dec);
  if (!has_kernel(op, s.device)) return define(inputs)[0];
  for (auto& a : inputs) a = normal(a, s);
  return mx::array({values.shape(0), w_dec.shape(1)}, mx::promote_types(values.dtype(), w_dec.dtype()),
                   std::make_shared<SparseDecode>(s, define), inputs);
}

Arrays SparseDecode::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                         const Arrays&) {
  auto s = stream();
  const auto &values = primals[0], &indices = primals[1], &w = primals[2], &ct = cotangents[0];
  Arrays grads;
  for (int a : argnums) {
    if (a == 0)
      grads.push_back(mx::astype(gather_dot(ct, w, indices, s), values.dtype(), s));
    else if (a == 1)
      grads.push_back(mx::zeros_like(indices, s));
    else if (a == 2)
      grads.push_back(mx::astype(sparse_outer(values, indices, ct, w.shape(0), s), w.dtype(), s));
    else
      grads.push_back(mx::astype(mx::sum(mx::astype(ct, mx::float32, s), 0, false, s), primals[3].dtype(), s));
  }
  return grads;
}

Arrays SparseDecode::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  mx::Shape shape{primals[0].shape(0), primals[2].shape(1)};
  Arrays terms{mx::zeros(shape, mx::promote_types(primals[0].dtype(), primals[2].dtype()), s)};
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (argnums[i] == 0) terms.push_back(sparse_decode(tangents[i], primals[1], primals[2], std::nullopt, s));
    if (argnums[i] == 2) terms.push_back(sparse_decode(primals[0], primals[1], tangents[i], std::nullopt, s));
    if (argnums[i] == 3) terms.push_back(mx::broadcast_to(mx::astype(tangents[i], terms[0].dtype(), s), shape, s));
  }
  return {add_all(terms, s)};
}

std::pair<Arrays, std::vector<int>> SparseDecode::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  for (size_t i = 2; i < axes.size(); ++i)
    if (axes[i] >= 0) return FusedPrimitive::vmap(inputs, axes);
  auto s = stream();  // more rows of the same problem
  auto [batch, rows] = batch_rows({inputs[0], inputs[1]}, {axes[0], axes[1]}, s);
  std::optional<mx::array> bias;
  if (inputs.size() > 3) bias = inputs[3];
  auto out = sparse_decode(rows[0], rows[1], inputs[2], bias, s);
  return {{mx::unflatten(out, 0, {batch, -1}, s)}, {0}};
}

}  // namespace mlxsae
