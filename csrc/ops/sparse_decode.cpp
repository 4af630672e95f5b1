#include "ops/sparse_decode.h"

#include "gpu/sparse_decode.h"
#include "ops/slots.h"

namespace mlxsae {
namespace {

/** The products of one chunk; an unused slot adds nothing, whatever its row holds. */
mx::array scaled_rows(const mx::array& values, const mx::array& indices, const mx::array& w, mx::Stream s) {
  auto v = mx::expand_dims(mx::astype(values, mx::float32, s), -1, s);
  auto rows = mx::astype(mx::take(w, indices, 0, s), mx::float32, s);
  return mx::where(mx::not_equal(v, mx::array(0.0f), s), mx::multiply(v, rows, s), mx::array(0.0f), s);
}

Arrays sparse_decode_graph_csr(const Arrays& in, mx::Stream s) {
  const auto &values = in[0], &indices = in[1], &w = in[2], &offsets = in.back();
  int nnz = values.shape(0), n = offsets.shape(0) - 1, d = w.shape(1);
  auto row = entry_rows(offsets, nnz, s);
  auto used = mx::less(row, mx::array(n), s);
  auto v = mx::where(used, values, mx::array(0, values.dtype()), s);
  auto ids = mx::where(used, indices, mx::array(0, mx::uint32), s);
  auto out = mx::zeros({n + 1, d}, mx::float32, s);  // the last row takes what is in none
  for (auto [begin, end] : entry_chunks(nnz, d)) {
    auto parts = scaled_rows(entries(v, begin, end, s), entries(ids, begin, end, s), w, s);
    out = mx::scatter_add(out, entries(row, begin, end, s), mx::expand_dims(parts, 1, s), 0, s);
  }
  out = mx::slice(out, {0, 0}, {n, d}, s);
  if (in.size() > 4) out = mx::add(out, mx::astype(in[3], mx::float32, s), s);
  return {mx::astype(out, mx::promote_types(values.dtype(), w.dtype()), s)};
}

Arrays sparse_decode_graph(const Arrays& in, mx::Stream s) {
  const auto &values = in[0], &indices = in[1], &w = in[2];
  auto type = mx::promote_types(values.dtype(), w.dtype());
  int n = values.shape(0), d = w.shape(1);
  auto out = in.size() > 3 ? mx::broadcast_to(mx::astype(in[3], mx::float32, s), {n, d}, s)
                           : mx::zeros({n, d}, mx::float32, s);
  for (auto [begin, end] : slot_chunks(values.shape(1), n, d)) {
    auto parts = scaled_rows(columns(values, begin, end, s), columns(indices, begin, end, s), w, s);
    out = mx::add(out, mx::sum(parts, 1, false, s), s);
  }
  return {mx::astype(out, type, s)};
}

}  // namespace

mx::array sparse_decode(const mx::array& values, const mx::array& indices, const mx::array& w_dec,
                        const std::optional<mx::array>& b_dec, const std::optional<mx::array>& offsets,
                        mx::StreamOrDevice s_) {
  const char* op = "sparse_decode";
  auto s = mx::to_stream(s_);
  auto code = check_code(op, &values, indices, offsets, s);
  check_matrix(op, "w_dec", w_dec);
  if (w_dec.shape(0) == 0 && indices.size() > 0)
    fail(op, "w_dec must have at least one feature but got ", w_dec.shape(), ".");
  if (b_dec) check_vector(op, "b_dec", *b_dec, w_dec.shape(1), "d_out");
  bool csr = offsets.has_value();
  auto define = [s, csr](const Arrays& in) {
    return csr ? sparse_decode_graph_csr(in, s) : sparse_decode_graph(in, s);
  };
  Arrays inputs{values, code.indices, w_dec};
  if (b_dec) inputs.push_back(*b_dec);
  if (csr) inputs.push_back(*code.offsets);
  if (!has_kernel(op, s.device)) return define(inputs)[0];
  for (auto& a : inputs) a = normal(a, s);
  return mx::array({code.n, w_dec.shape(1)}, mx::promote_types(values.dtype(), w_dec.dtype()),
                   std::make_shared<SparseDecode>(s, define, csr), inputs);
}

Arrays SparseDecode::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                         const Arrays&) {
  auto s = stream();
  const auto &values = primals[0], &indices = primals[1], &w = primals[2], &ct = cotangents[0];
  auto offsets = offsets_of(primals);
  Arrays grads;
  for (int a : argnums) {
    if (a == 0)
      grads.push_back(mx::astype(gather_dot(ct, w, indices, offsets, s), values.dtype(), s));
    else if (a == 2)
      grads.push_back(mx::astype(sparse_outer(values, indices, ct, w.shape(0), offsets, s), w.dtype(), s));
    else if (a == 3 && optional(primals, 3))
      grads.push_back(mx::astype(mx::sum(mx::astype(ct, mx::float32, s), 0, false, s), primals[3].dtype(), s));
    else
      grads.push_back(mx::zeros_like(primals[a], s));
  }
  return grads;
}

Arrays SparseDecode::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  auto offsets = offsets_of(primals);
  auto shape = output_shapes(primals)[0];
  Arrays terms{mx::zeros(shape, mx::promote_types(primals[0].dtype(), primals[2].dtype()), s)};
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (argnums[i] == 0) terms.push_back(sparse_decode(tangents[i], primals[1], primals[2], std::nullopt, offsets, s));
    if (argnums[i] == 2) terms.push_back(sparse_decode(primals[0], primals[1], tangents[i], std::nullopt, offsets, s));
    if (argnums[i] == 3 && optional(primals, 3))
      terms.push_back(mx::broadcast_to(mx::astype(tangents[i], terms[0].dtype(), s), shape, s));
  }
  return {add_all(terms, s)};
}

std::pair<Arrays, std::vector<int>> SparseDecode::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  auto s = stream();
  auto again = [&](const Arrays& in) -> Arrays {
    return {sparse_decode(in[0], in[1], in[2], optional(in, 3), offsets_of(in), s)};
  };
  if (csr_ || batch_of(inputs, axes) == 0) return vmap_each(again, inputs, axes, s);
  for (size_t i = 2; i < axes.size(); ++i)
    if (axes[i] >= 0) return FusedPrimitive::vmap(inputs, axes);
  // More rows of the same problem.
  auto [batch, rows] = batch_rows({inputs[0], inputs[1]}, {axes[0], axes[1]}, s);
  auto out = sparse_decode(rows[0], rows[1], inputs[2], optional(inputs, 3), std::nullopt, s);
  return {{mx::unflatten(out, 0, {batch, -1}, s)}, {0}};
}

gpu::Plan SparseDecode::plan(const Arrays& in, const gpu::Device&) {
  auto bias = optional(in, 3);
  bool aligned = aligned_rows(in[2]) && (!bias || aligned_rows(*bias));
  return gpu::sparse_decode(code_size(in[1], offsets_of(in), gpu_type(in[0])), in[2].shape(1), in[2].shape(0),
                            gpu_type(in[2]), bias ? std::optional(gpu_type(*bias)) : std::nullopt, aligned);
}

}  // namespace mlxsae
