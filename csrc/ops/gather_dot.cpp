#include "ops/gather_dot.h"

#include "ops/slots.h"

namespace mlxsae {
namespace {

Arrays graph(const Arrays& in, mx::Stream s) {
  const auto &rows = in[0], &weight = in[1], &indices = in[2];
  auto r = mx::expand_dims(mx::astype(rows, mx::float32, s), 1, s);
  Arrays parts;
  for (auto [begin, end] : slot_chunks(indices.shape(1), rows.shape(0), rows.shape(1))) {
    auto w = mx::astype(mx::take(weight, columns(indices, begin, end, s), 0, s), mx::float32, s);
    parts.push_back(mx::sum(mx::multiply(w, r, s), 2, false, s));
  }
  auto out = parts.empty() ? mx::zeros(indices.shape(), mx::float32, s) : mx::concatenate(parts, 1, s);
  return {mx::astype(out, mx::promote_types(rows.dtype(), weight.dtype()), s)};
}

}  // namespace

mx::array gather_dot(const mx::array& rows, const mx::array& weight, const mx::array& indices, mx::StreamOrDevice s_) {
  const char* op = "gather_dot";
  auto s = mx::to_stream(s_);
  check_matrix(op, "rows", rows);
  check_matrix(op, "weight", weight);
  auto ids = check_code(op, nullptr, indices, s);
  if (rows.shape(1) != weight.shape(1))
    fail(op, "rows [n, d] and weight [d_sae, d] must share d but got ", rows.shape(), " and ", weight.shape(), ".");
  if (rows.shape(0) != indices.shape(0))
    fail(op, "rows [n, d] and indices [n, k] must share n but got ", rows.shape(), " and ", indices.shape(), ".");
  if (weight.shape(0) == 0 && indices.size() > 0)
    fail(op, "weight must have at least one feature but got ", weight.shape(), ".");
  auto define = [s](const Arrays& in) { return graph(in, s); };
  Arrays inputs{rows, weight, ids};
  if (!has_kernel(op, s.device)) return define(inputs)[0];
  for (auto& a : inputs) a = normal(a, s);
  return mx::array(indices.shape(), mx::promote_types(rows.dtype(), weight.dtype()),
                   std::make_shared<GatherDot>(s, define), inputs);
}

Arrays GatherDot::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  auto s = stream();
  const auto &rows = primals[0], &weight = primals[1], &indices = primals[2], &ct = cotangents[0];
  Arrays grads;
  for (int a : argnums) {
    if (a == 0)
      grads.push_back(mx::astype(sparse_decode(ct, indices, weight, std::nullopt, s), rows.dtype(), s));
    else if (a == 1)
      grads.push_back(mx::astype(sparse_outer(ct, indices, rows, weight.shape(0), s), weight.dtype(), s));
    else
      grads.push_back(mx::zeros_like(indices, s));
  }
  return grads;
}

Arrays GatherDot::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  Arrays terms{mx::zeros(primals[2].shape(), mx::promote_types(primals[0].dtype(), primals[1].dtype()), s)};
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (argnums[i] == 0) terms.push_back(gather_dot(tangents[i], primals[1], primals[2], s));
    if (argnums[i] == 1) terms.push_back(gather_dot(primals[0], tangents[i], primals[2], s));
  }
  return {add_all(terms, s)};
}

std::pair<Arrays, std::vector<int>> GatherDot::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  if (axes[1] >= 0) return FusedPrimitive::vmap(inputs, axes);
  auto s = stream();  // more rows of the same problem
  auto [batch, rows] = batch_rows({inputs[0], inputs[2]}, {axes[0], axes[2]}, s);
  return {{mx::unflatten(gather_dot(rows[0], inputs[1], rows[1], s), 0, {batch, -1}, s)}, {0}};
}

}  // namespace mlxsae
