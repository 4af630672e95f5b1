#include "ops/tokens_since_fired.h"

#include "gpu/tokens_since_fired.h"

namespace mlxsae {
namespace {

Arrays tokens_since_fired_graph(const Arrays& in, bool csr, int n_tokens, mx::Stream s) {
  const auto& counts = in[0];
  auto values = in[1], indices = in[2];
  if (csr) {  // entries of no row have not fired
    auto end = mx::slice(in[3], {in[3].shape(0) - 1}, {in[3].shape(0)}, s);
    auto used = mx::less(mx::arange(0, values.shape(0), mx::int64, s), end, s);
    values = mx::where(used, values, mx::array(0, values.dtype()), s);
    indices = mx::where(used, indices, mx::array(0, mx::uint32), s);
  }
  auto fired = mx::astype(mx::logical_not(mx::less_equal(values, mx::array(0, values.dtype()), s), s), mx::int32, s);
  auto hits = mx::scatter_max(mx::zeros_like(counts, s), mx::flatten(indices, s),
                              mx::reshape(fired, {static_cast<int>(fired.size()), 1}, s), 0, s);
  auto room = mx::array(INT32_MAX - n_tokens);
  auto older = mx::add(mx::minimum(counts, room, s), mx::array(n_tokens), s);
  return {mx::where(mx::greater(hits, mx::array(0), s), mx::zeros_like(counts, s), older, s)};
}

}  // namespace

mx::array tokens_since_fired(const mx::array& counts, const mx::array& values, const mx::array& indices, int n_tokens,
                             const std::optional<mx::array>& offsets, mx::StreamOrDevice s_) {
  const char* op = "tokens_since_fired";
  auto s = mx::to_stream(s_);
  if (counts.ndim() != 1 || counts.dtype() != mx::int32)
    fail(op, "tokens_since_fired must be int32 of shape [d_sae] but got ", counts.dtype(), " ", counts.shape(), ".");
  auto code = check_code(op, &values, indices, offsets, s);
  if (n_tokens < 0) fail(op, "n_tokens must be at least 0 but got ", n_tokens, ".");
  bool csr = offsets.has_value();
  auto define = [s, csr, n_tokens](const Arrays& in) { return tokens_since_fired_graph(in, csr, n_tokens, s); };
  Arrays inputs{counts, values, code.indices};
  if (csr) inputs.push_back(*code.offsets);
  if (!has_kernel(op, s.device)) return define(inputs)[0];
  for (auto& a : inputs) a = normal(a, s);
  return mx::array(counts.shape(), mx::int32, std::make_shared<TokensSinceFired>(s, define, csr, n_tokens), inputs);
}

Arrays TokensSinceFired::jvp(const Arrays& primals, const Arrays&, const std::vector<int>&) {
  return {mx::zeros_like(primals[0], stream())};
}

Arrays TokensSinceFired::vjp(const Arrays& primals, const Arrays&, const std::vector<int>& argnums, const Arrays&) {
  Arrays grads;
  for (int a : argnums) grads.push_back(mx::zeros_like(primals[a], stream()));
  return grads;
}

gpu::Plan TokensSinceFired::plan(const Arrays& in, const gpu::Device&) {
  return gpu::tokens_since_fired(code_size(in[2], offsets_of(in), gpu_type(in[1])), in[0].shape(0), n_tokens_);
}

}  // namespace mlxsae
