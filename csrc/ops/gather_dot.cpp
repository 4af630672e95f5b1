#include "ops/gather_dot.h"

#include "gpu/gather_dot.h"
#include "ops/slots.h"

namespace mlxsae {
namespace {

Arrays gather_dot_graph_csr(const Arrays& in, mx::Stream s) {
  const auto &rows = in[0], &weight = in[1], &indices = in[2], &offsets = in[3];
  int nnz = indices.shape(0), n = offsets.shape(0) - 1;
  auto type = mx::promote_types(rows.dtype(), weight.dtype());
  if (nnz == 0 || n == 0) return {mx::zeros({nnz}, type, s)};
  auto row = entry_rows(offsets, nnz, s);
  auto used = mx::less(row, mx::array(n), s);
  auto ids = mx::where(used, indices, mx::array(0, mx::uint32), s);
  row = mx::minimum(row, mx::array(n - 1), s);
  Arrays parts;
  for (auto [begin, end] : entry_chunks(nnz, rows.shape(1))) {
    auto r = mx::astype(mx::take(rows, entries(row, begin, end, s), 0, s), mx::float32, s);
    auto w = mx::astype(mx::take(weight, entries(ids, begin, end, s), 0, s), mx::float32, s);
    parts.push_back(mx::sum(mx::multiply(w, r, s), 1, false, s));
  }
  return {mx::astype(mx::where(used, mx::concatenate(parts, 0, s), mx::array(0.0f), s), type, s)};
}

Arrays gather_dot_graph(const Arrays& in, mx::Stream s) {
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

mx::array gather_dot(const mx::array& rows, const mx::array& weight, const mx::array& indices,
                     const std::optional<mx::array>& offsets, mx::StreamOrDevice s_) {
  const char* op = "gather_dot";
  auto s = mx::to_stream(s_);
  check_matrix(op, "rows", rows);
  check_matrix(op, "weight", weight);
  auto code = check_code(op, nullptr, indices, offsets, s);
  if (rows.shape(1) != weight.shape(1))
    fail(op, "rows [n, d] and weight [d_sae, d] must share d but got ", rows.shape(), " and ", weight.shape(), ".");
  if (rows.shape(0) != code.n)
    fail(op, "rows [n, d] and the code must share n but got ", rows.shape(), " and n=", code.n, ".");
  if (weight.shape(0) == 0 && indices.size() > 0)
    fail(op, "weight must have at least one feature but got ", weight.shape(), ".");
  bool csr = offsets.has_value();
  auto define = [s, csr](const Arrays& in) { return csr ? gather_dot_graph_csr(in, s) : gather_dot_graph(in, s); };
  Arrays inputs{rows, weight, code.indices};
  if (csr) inputs.push_back(*code.offsets);
  if (!has_kernel(op, s.device)) return define(inputs)[0];
  for (auto& a : inputs) a = normal(a, s);
  return mx::array(indices.shape(), mx::promote_types(rows.dtype(), weight.dtype()),
                   std::make_shared<GatherDot>(s, define, csr), inputs);
}

Arrays GatherDot::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  auto s = stream();
  const auto &rows = primals[0], &weight = primals[1], &indices = primals[2], &ct = cotangents[0];
  auto offsets = offsets_of(primals);
  Arrays grads;
  for (int a : argnums) {
    if (a == 0)
      grads.push_back(mx::astype(sparse_decode(ct, indices, weight, std::nullopt, offsets, s), rows.dtype(), s));
    else if (a == 1)
      grads.push_back(mx::astype(sparse_outer(ct, indices, rows, weight.shape(0), offsets, s), weight.dtype(), s));
    else
      grads.push_back(mx::zeros_like(primals[a], s));
  }
  return grads;
}

Arrays GatherDot::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  auto offsets = offsets_of(primals);
  Arrays terms{mx::zeros(primals[2].shape(), mx::promote_types(primals[0].dtype(), primals[1].dtype()), s)};
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (argnums[i] == 0) terms.push_back(gather_dot(tangents[i], primals[1], primals[2], offsets, s));
    if (argnums[i] == 1) terms.push_back(gather_dot(primals[0], tangents[i], primals[2], offsets, s));
  }
  return {add_all(terms, s)};
}

std::pair<Arrays, std::vector<int>> GatherDot::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  auto s = stream();
  if (csr_ || batch_of(inputs, axes) == 0)
    return vmap_each([&](const Arrays& in) -> Arrays { return {gather_dot(in[0], in[1], in[2], offsets_of(in), s)}; },
                     inputs, axes, s);
  if (axes[1] >= 0) return FusedPrimitive::vmap(inputs, axes);
  // More rows of the same problem.
  auto [batch, rows] = batch_rows({inputs[0], inputs[2]}, {axes[0], axes[2]}, s);
  return {{mx::unflatten(gather_dot(rows[0], inputs[1], rows[1], std::nullopt, s), 0, {batch, -1}, s)}, {0}};
}

gpu::Plan GatherDot::plan(const Arrays& in, const gpu::Device&) {
  return gpu::gather_dot(code_size(in[2], offsets_of(in)), in[1].shape(1), in[1].shape(0), gpu_type(in[0]),
                         gpu_type(in[1]), aligned_rows(in[0]) && aligned_rows(in[1]));
}

}  // namespace mlxsae
