#include "ops/encoder_shadow.h"

#include "gpu/encoder_shadow.h"

namespace mlxsae {
namespace {

/** The same bound with wider margins: sums in plain ops are not in a known order (cpu/kernel_screen.h has the terms).
 */
Arrays encoder_shadow_graph(const Arrays& in, mx::Dtype dtype, mx::Stream s) {
  const auto& w = in[0];
  float d = static_cast<float>(w.shape(1)), gamma = 2 * (d + 16) * 5.97e-8f, up = 1 + 1e-4f + d * 1e-6f;
  auto norm = [&](const mx::array& a) {
    return mx::multiply(mx::sqrt(mx::sum(mx::square(a, s), 1, false, s), s), mx::array(up), s);
  };
  auto times = [s](const mx::array& a, float by) { return mx::multiply(a, mx::array(by), s); };
  auto full = norm(w), low = w, low32 = w;
  Arrays more;
  auto bound = [&](const mx::array& rounded) {
    return times(mx::add(norm(mx::subtract(w, rounded, s)), times(norm(rounded), gamma), s), 1.0001f);
  };
  if (dtype == mx::int16) {
    full = mx::maximum(full, mx::array(1e-19f), s);  // a row of zeros has a scale too
    auto scale = times(mx::expand_dims(full, 1, s), 0x1p-15f);
    auto whole = mx::clip(mx::round(mx::divide(w, scale, s), s), mx::array(-32767.0f), mx::array(32767.0f), s);
    low = mx::astype(whole, dtype, s), low32 = mx::multiply(whole, scale, s);
  } else if (dtype == mx::int8) {
    full = mx::maximum(full, mx::array(1e-19f), s);
    auto scale = times(mx::expand_dims(full, 1, s), 0x1.04p-15f);
    auto whole = mx::clip(mx::round(mx::divide(w, scale, s), s), mx::array(-32385.0f), mx::array(32385.0f), s);
    auto most = mx::max(mx::abs(whole, s), 1, true, s);
    auto unit = mx::maximum(mx::ceil(mx::divide(most, mx::array(127.0f), s), s), mx::array(1.0f), s);
    auto high = mx::round(mx::divide(whole, unit, s), s);
    low = mx::astype(mx::concatenate({high, mx::subtract(whole, mx::multiply(high, unit, s), s)}, 1, s), dtype, s);
    low32 = mx::multiply(whole, scale, s);
    more = {mx::squeeze(unit, 1, s), bound(mx::multiply(high, mx::multiply(unit, scale, s), s)),
            mx::sum(high, 1, false, s)};
  } else {
    low = mx::astype(w, dtype, s), low32 = mx::astype(low, mx::float32, s);
  }
  auto tiny = times(mx::add(full, mx::array(1.0f), s), 4e-38f * d);
  Arrays columns{full, bound(low32), tiny};
  columns.insert(columns.end(), more.begin(), more.end());
  return {low, mx::stack(columns, 0, s)};
}

void check_type(const char* op, const char* what, mx::Dtype type, mx::Device device) {
  if (type != mx::bfloat16 && type != mx::int16 && type != mx::int8)
    fail(op, what, " must be bfloat16, int16 or int8 but got ", type, ".");
  if (type != mx::bfloat16 && device != mx::Device::cpu)
    fail(op, what, " must be bfloat16 on a GPU but is ", type, ": such shadows screen on the CPU only.");
}

}  // namespace

std::pair<mx::array, mx::array> encoder_shadow(const mx::array& w_enc, std::optional<mx::Dtype> dtype_,
                                               mx::StreamOrDevice s_) {
  const char* op = "encoder_shadow";
  auto s = mx::to_stream(s_);
  check_matrix(op, "w_enc", w_enc);
  auto dtype = dtype_.value_or(s.device == mx::Device::cpu ? fastest_shadow() : mx::bfloat16);
  check_type(op, "dtype", dtype, s.device);
  auto w = mx::stop_gradient(mx::astype(w_enc, mx::float32, s), s);
  auto define = [dtype, s](const Arrays& in) { return encoder_shadow_graph(in, dtype, s); };
  if (!has_kernel(op, s.device)) {
    auto out = define({w});
    return {out[0], out[1]};
  }
  auto primitive = std::make_shared<EncoderShadow>(s, define, dtype);
  Arrays inputs{normal(w, s)};
  auto out = mx::array::make_arrays(primitive->output_shapes(inputs), {dtype, mx::float32}, primitive, inputs);
  return {out[0], out[1]};
}

void check_shadow(const char* op, const Shadow& shadow, const mx::array& w_enc, mx::Device device) {
  if (w_enc.dtype() != mx::float32)
    fail(op, "w_enc must be float32 where a shadow is given but got ", w_enc.dtype(), ".");
  auto type = shadow.w16.dtype();
  auto shapes = shadow_shapes(w_enc.shape(), type);
  bool known = type == mx::bfloat16 || type == mx::int16 || type == mx::int8;
  if (!known || shadow.w16.shape() != shapes[0] || shadow.columns.dtype() != mx::float32 ||
      shadow.columns.shape() != shapes[1])
    fail(op, "shadow must be encoder_shadow(w_enc), bfloat16 or int16 ", w_enc.shape(),
         " and float32 [3, d_sae], or int8 [d_sae, 2 d_in] and float32 [6, d_sae], but got ", type, " ",
         shadow.w16.shape(), " and ", shadow.columns.dtype(), " ", shadow.columns.shape(), ".");
  check_type(op, "shadow", type, device);
}

gpu::Plan EncoderShadow::plan(const Arrays& in, const gpu::Device&) {
  return gpu::encoder_shadow(in[0].shape(0), in[0].shape(1), aligned_rows(in[0]));
}

}  // namespace mlxsae
