#include "ops/tokens_since_fired.h"

namespace mlxsae {
namespace {

Arrays graph(const Arrays& in, int n_tokens, mx::Stream s) {
  const auto &counts = in[0], &values = in[1], &indices = in[2];
  auto fired = mx::astype(mx::logical_not(mx::less_equal(values, mx::array(0, values.dtype()), s), s), mx::int32, s);
  auto hits = mx::scatter_max(mx::zeros_like(counts, s), mx::flatten(indices, s),
                              mx::reshape(fired, {static_cast<int>(fired.size()), 1}, s), 0, s);
  auto room = mx::array(INT32_MAX - n_tokens);
  auto older = mx::add(mx::minimum(counts, room, s), mx::array(n_tokens), s);
  return {mx::where(mx::greater(hits, mx::array(0), s), mx::zeros_like(counts, s), older, s)};
}

}  // namespace

mx::array tokens_since_fired(const mx::array& counts, const mx::array& values, const mx::array& indices, int n_tokens,
                             mx::StreamOrDevice s_) {
  const char* op = "tokens_since_fired";
  auto s = mx::to_stream(s_);
  if (counts.ndim() != 1 || counts.dtype() != mx::int32)
    fail(op, "tokens_since_fired must be int32 of shape [d_sae] but got ", counts.dtype(), " ", counts.shape(), ".");
  auto ids = check_code(op, &values, indices, s);
  if (n_tokens < 0) fail(op, "n_tokens must be at least 0 but got ", n_tokens, ".");
  auto define = [s, n_tokens](const Arrays& in) { return graph(in, n_tokens, s); };
  Arrays inputs{counts, values, ids};
  if (!has_kernel(op, s.device)) return define(inputs)[0];
  for (auto& a : inputs) a = normal(a, s);
  return mx::array(counts.shape(), mx::int32, std::make_shared<TokensSinceFired>(s, define, n_tokens), inputs);
}

Arrays TokensSinceFired::jvp(const Arrays& primals, const Arrays&, const std::vector<int>&) {
  return {mx::zeros_like(primals[0], stream())};
}

Arrays TokensSinceFired::vjp(const Arrays& primals, const Arrays&, const std::vector<int>& argnums, const Arrays&) {
  Arrays grads;
  for (int a : argnums) grads.push_back(mx::zeros_like(primals[a], stream()));
  return grads;
}

}  // namespace mlxsae
