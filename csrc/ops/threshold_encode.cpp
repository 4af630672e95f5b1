#include "ops/threshold_encode.h"

#include "gpu/csr_encode.h"
#include "ops/selection.h"

namespace mlxsae {
namespace {

/** The definition in plain MLX ops, rows in chunks: each entry goes to its rank in the order of (row, feature). */
Arrays threshold_encode_graph(const Arrays& in, int capacity, mx::Stream s) {
  int n = in[0].shape(0), d_sae = in[1].shape(0);
  auto values = mx::zeros({capacity + 1}, mx::float32, s);  // the last one takes what finds no room
  auto indices = mx::zeros({capacity + 1}, mx::int32, s);
  auto count = mx::array(int64_t{0}, mx::int64);
  auto room = mx::array(int64_t{capacity}, mx::int64);
  Arrays counts{mx::zeros({0}, mx::int32, s)};
  for (auto [begin, end] : row_chunks(n, d_sae)) {
    auto pre = pre_acts(in, begin, end, s);
    auto kept = mx::logical_not(mx::less_equal(mx::stop_gradient(pre, s), in[3], s), s);
    counts.push_back(mx::sum(mx::astype(kept, mx::int32, s), 1, false, s));
    auto flat = mx::flatten(kept, s);
    auto rank = mx::add(mx::cumsum(mx::astype(flat, mx::int64, s), 0, false, false, s), count, s);
    auto place = mx::astype(mx::where(flat, mx::minimum(rank, room, s), room, s), mx::int32, s);
    auto v = mx::where(flat, mx::flatten(pre, s), mx::array(0.0f), s);
    auto f = mx::flatten(mx::broadcast_to(mx::arange(0, d_sae, mx::int32, s), {end - begin, d_sae}, s), s);
    values = mx::scatter_add(values, place, mx::expand_dims(v, 1, s), 0, s);
    indices = mx::scatter_max(indices, place, mx::expand_dims(f, 1, s), 0, s);
    count = mx::add(count, mx::sum(mx::astype(flat, mx::int64, s), s), s);
  }
  auto offsets = mx::minimum(offsets_from(mx::concatenate(counts, 0, s), s), room, s);
  auto type = mx::promote_types(in[0].dtype(), in[1].dtype());
  return {mx::astype(mx::slice(values, {0}, {capacity}, s), type, s),
          mx::astype(mx::slice(indices, {0}, {capacity}, s), mx::uint32, s), offsets, count};
}

Arrays encode(const mx::array& x, const mx::array& w_enc, const std::optional<mx::array>& b_enc,
              const mx::array& threshold, int capacity, mx::Stream s) {
  const char* op = "threshold_encode";
  int d_sae = check_encoder(op, x, w_enc, b_enc);
  check_float(op, "threshold", threshold);
  if (threshold.size() != 1 && threshold.shape() != mx::Shape{d_sae})
    fail(op, "threshold must be one number or of shape [d_sae] = [", d_sae, "] but got ", threshold.shape(), ".");
  if (capacity < 0 || capacity == INT32_MAX) fail(op, "capacity must be in [0, 2^31 - 1) but got ", capacity, ".");
  auto define = [capacity, s](const Arrays& in) { return threshold_encode_graph(in, capacity, s); };
  auto t = mx::astype(mx::stop_gradient(threshold, s), mx::float32, s);
  if (threshold.size() == 1) t = mx::reshape(t, {1}, s);
  // Last of all: mx.compile(shapeless=True) takes an elementwise op to have the shape from before a broadcast.
  auto for_each = [&](const mx::array& a) { return mx::broadcast_to(a, {d_sae}, s); };
  // relu comes first; and a threshold of NaN is seen in the values
  auto bounds = for_each(mx::where(mx::greater(t, mx::array(0.0f), s), t, mx::array(0.0f), s));
  auto given = b_enc ? mx::astype(*b_enc, mx::float32, s) : mx::array(0.0f);
  auto bias = for_each(mx::where(mx::isnan(t, s), t, given, s));
  Arrays inputs{x, w_enc, bias, bounds};
  if (!has_kernel(op, s.device)) return only_values(define(inputs), s);
  one_type_on_gpu(inputs, s);
  for (auto& a : inputs) a = normal(a, s);
  auto primitive = std::make_shared<ThresholdEncode>(s, define, capacity);
  auto type = mx::promote_types(x.dtype(), w_enc.dtype());
  return only_values(mx::array::make_arrays(primitive->output_shapes(inputs), {type, mx::uint32, mx::int64, mx::int64},
                                            primitive, inputs),
                     s);
}

}  // namespace

std::pair<CsrCode, mx::array> threshold_encode(const mx::array& x, const mx::array& w_enc,
                                               const std::optional<mx::array>& b_enc, const mx::array& threshold,
                                               int capacity, mx::StreamOrDevice s) {
  auto out = encode(x, w_enc, b_enc, threshold, capacity, mx::to_stream(s));
  return {{out[0], out[1], out[2]}, out[3]};
}

gpu::Plan ThresholdEncode::plan(const Arrays& in, const gpu::Device& device) {
  return gpu::threshold_encode({encode_sizes(in, {}), capacity_}, device);
}

Arrays ThresholdEncode::again(const Arrays& in) { return encode(in[0], in[1], in[2], in[3], capacity_, stream()); }

}  // namespace mlxsae
