#include "ops/csr_encode.h"

#include "ops/selection.h"

namespace mlxsae {

Arrays only_values(Arrays out, mx::Stream s) {
  for (size_t i = 1; i < out.size(); ++i) out[i] = mx::stop_gradient(out[i], s);
  return out;
}

std::vector<std::pair<int, int>> row_chunks(int n, int d_sae) {
  int step = std::max(1, (1 << 22) / std::max(1, d_sae));
  std::vector<std::pair<int, int>> chunks;
  for (int t = 0; t < n; t += step) chunks.emplace_back(t, std::min(n, t + step));
  return chunks;
}

mx::array pre_acts(const Arrays& in, int begin, int end, mx::Stream s) {
  auto rows = mx::astype(mx::slice(in[0], {begin, 0}, {end, in[0].shape(1)}, s), mx::float32, s);
  auto pre = mx::matmul(rows, mx::transpose(mx::astype(in[1], mx::float32, s), s), s);
  return mx::add(pre, mx::astype(in[2], mx::float32, s), s);
}

mx::array offsets_from(const mx::array& counts, mx::Stream s) {
  auto ends = mx::cumsum(mx::astype(counts, mx::int64, s), 0, false, true, s);
  return mx::concatenate({mx::zeros({1}, mx::int64, s), ends}, 0, s);
}

Arrays CsrEncode::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                      const Arrays& outputs) {
  auto s = stream();
  const auto &x = primals[0], &w = primals[1], &indices = outputs[1], &offsets = outputs[2];
  auto d_pre = gate(outputs[0], cotangents[0], s);
  Arrays grads;
  for (int a : argnums) {
    if (a == 0) {
      grads.push_back(mx::astype(sparse_decode(d_pre, indices, w, std::nullopt, offsets, s), x.dtype(), s));
    } else if (a == 1) {
      grads.push_back(mx::astype(sparse_outer(d_pre, indices, x, w.shape(0), offsets, s), w.dtype(), s));
    } else if (a == 2) {
      auto d = sparse_outer(mx::astype(d_pre, mx::float32, s), indices, ones_column(x, s), w.shape(0), offsets, s);
      grads.push_back(mx::astype(mx::squeeze(d, 1, s), primals[2].dtype(), s));
    } else {
      grads.push_back(mx::zeros_like(primals[a], s));
    }
  }
  return grads;
}

Arrays CsrEncode::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  auto s = stream();
  auto out = again(primals);
  const auto &values = out[0], &indices = out[1], &offsets = out[2];
  Arrays terms{mx::zeros_like(values, s)};
  for (size_t i = 0; i < argnums.size(); ++i) {
    const auto& t = tangents[i];
    if (argnums[i] == 0) terms.push_back(gather_dot(t, primals[1], indices, offsets, s));
    if (argnums[i] == 1) terms.push_back(gather_dot(primals[0], t, indices, offsets, s));
    if (argnums[i] == 2) terms.push_back(mx::take(t, indices, s));
  }
  Arrays result{mx::astype(gate(values, add_all(terms, s), s), values.dtype(), s)};
  for (size_t i = 1; i < out.size(); ++i) result.push_back(mx::zeros_like(out[i], s));
  return result;
}

std::pair<Arrays, std::vector<int>> CsrEncode::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  return vmap_each([this](const Arrays& in) { return again(in); }, inputs, axes, stream());
}

}  // namespace mlxsae
