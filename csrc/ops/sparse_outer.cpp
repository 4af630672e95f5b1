#include "ops/sparse_outer.h"

#include "gpu/sparse_outer.h"
#include "ops/slots.h"

namespace mlxsae {
namespace {

Arrays sparse_outer_graph_csr(const Arrays& in, int d_sae, mx::Stream s) {
  const auto &values = in[0], &indices = in[1], &rows = in[2], &offsets = in[3];
  int nnz = values.shape(0), n = rows.shape(0), d = rows.shape(1);
  auto out = mx::zeros({d_sae, d}, mx::float32, s);
  if (nnz > 0 && n > 0) {
    auto row = entry_rows(offsets, nnz, s);
    auto used = mx::less(row, mx::array(n), s);
    auto v32 = mx::where(used, mx::astype(values, mx::float32, s), mx::array(0.0f), s);
    auto ids = mx::where(used, indices, mx::array(0, mx::uint32), s);
    row = mx::minimum(row, mx::array(n - 1), s);
    for (auto [begin, end] : entry_chunks(nnz, d)) {
      auto v = mx::expand_dims(entries(v32, begin, end, s), 1, s);
      auto r = mx::astype(mx::take(rows, entries(row, begin, end, s), 0, s), mx::float32, s);
      auto parts = mx::where(mx::not_equal(v, mx::array(0.0f), s), mx::multiply(v, r, s), mx::array(0.0f), s);
      out = mx::scatter_add(out, entries(ids, begin, end, s), mx::expand_dims(parts, 1, s), 0, s);
    }
  }
  return {mx::astype(out, mx::promote_types(values.dtype(), rows.dtype()), s)};
}

Arrays sparse_outer_graph(const Arrays& in, int d_sae, mx::Stream s) {
  const auto &values = in[0], &indices = in[1], &rows = in[2];
  int n = rows.shape(0), d = rows.shape(1);
  auto r = mx::expand_dims(mx::astype(rows, mx::float32, s), 1, s);
  auto out = mx::zeros({d_sae, d}, mx::float32, s);
  for (auto [begin, end] : slot_chunks(values.shape(1), n, d)) {
    auto v = mx::expand_dims(mx::astype(columns(values, begin, end, s), mx::float32, s), 2, s);
    auto used = mx::not_equal(v, mx::array(0.0f), s);
    auto parts = mx::where(used, mx::multiply(v, r, s), mx::array(0.0f), s);
    out = mx::scatter_add(out, columns(indices, begin, end, s), mx::expand_dims(parts, 2, s), 0, s);
  }
  return {mx::astype(out, mx::promote_types(values.dtype(), rows.dtype()), s)};
}

}  // namespace

mx::array sparse_outer(const mx::array& values, const mx::array& indices, const mx::array& rows, int d_sae,
                       const std::optional<mx::array>& offsets, mx::StreamOrDevice s_) {
  const char* op = "sparse_outer";
  auto s = mx::to_stream(s_);
  auto code = check_code(op, &values, indices, offsets, s);
  check_matrix(op, "rows", rows);
  if (rows.shape(0) != code.n)
    fail(op, "the code and rows [n, d] must share n but got n=", code.n, " and ", rows.shape(), ".");
  if (d_sae <= 0) fail(op, "d_sae must be positive but got ", d_sae, ".");
  bool csr = offsets.has_value();
  auto define = [s, csr, d_sae](const Arrays& in) {
    return csr ? sparse_outer_graph_csr(in, d_sae, s) : sparse_outer_graph(in, d_sae, s);
  };
  Arrays inputs{values, code.indices, rows};
  if (csr) inputs.push_back(*code.offsets);
  if (!has_kernel(op, s.device)) return define(inputs)[0];
  for (auto& a : inputs) a = normal(a, s);
  return mx::array({d_sae, rows.shape(1)}, mx::promote_types(values.dtype(), rows.dtype()),
                   std::make_shared<SparseOuter>(s, define, csr, d_sae), inputs);
}

Arrays SparseOuter::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                        const Arrays&) {
  auto s = stream();
  const auto &values = primals[0], &indices = primals[1], &rows = primals[2], &ct = cotangents[0];
  auto offsets = offsets_of(primals);
  Arrays grads;
  for (int a : argnums) {
    if (a == 0)
      grads.push_back(mx::astype(gather_dot(rows, ct, indices, offsets, s), values.dtype(), s));
    else if (a == 2)
      grads.push_back(mx::astype(sparse_decode(values, indices, ct, std::nullopt, offsets, s), rows.dtype(), s));
    else
      grads.push_back(mx::zeros_like(primals[a], s));
  }
  return grads;
}

Arrays SparseOuter::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  auto offsets = offsets_of(primals);
  Arrays terms{mx::zeros({d_sae_, primals[2].shape(1)}, mx::promote_types(primals[0].dtype(), primals[2].dtype()), s)};
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (argnums[i] == 0) terms.push_back(sparse_outer(tangents[i], primals[1], primals[2], d_sae_, offsets, s));
    if (argnums[i] == 2) terms.push_back(sparse_outer(primals[0], primals[1], tangents[i], d_sae_, offsets, s));
  }
  return {add_all(terms, s)};
}

std::pair<Arrays, std::vector<int>> SparseOuter::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  auto s = stream();
  if (csr_ || batch_of(inputs, axes) == 0)
    return vmap_each(
        [&](const Arrays& in) -> Arrays { return {sparse_outer(in[0], in[1], in[2], d_sae_, offsets_of(in), s)}; },
        inputs, axes, s);
  // One problem with a block of features for each element of the batch.
  int n = inputs[2].shape(axes[2] == 0 ? 1 : 0);
  auto [batch, rows] = batch_rows(inputs, axes, s);
  if (static_cast<int64_t>(batch) * d_sae_ > INT32_MAX) return FusedPrimitive::vmap(inputs, axes);
  auto block = mx::expand_dims(mx::repeat(mx::arange(0, batch, mx::uint32, s), n, 0, s), 1, s);
  auto width = mx::array(d_sae_, mx::uint32);
  auto ids = mx::add(rows[1], mx::multiply(block, width, s), s);
  // What is out of range stays so, and is refused: it must not become a feature of another block.
  ids = mx::where(mx::less(rows[1], width, s), ids, mx::array(UINT32_MAX, mx::uint32), s);
  auto out = sparse_outer(rows[0], ids, rows[2], batch * d_sae_, std::nullopt, s);
  return {{mx::unflatten(out, 0, {batch, d_sae_}, s)}, {0}};
}

gpu::Plan SparseOuter::plan(const Arrays& in, const gpu::Device&) {
  return gpu::sparse_outer(code_size(in[1], offsets_of(in), gpu_type(in[0])), in[2].shape(1), d_sae_, gpu_type(in[2]),
                           aligned_rows(in[2]));
}

}  // namespace mlxsae
