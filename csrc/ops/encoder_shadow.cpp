#include "ops/encoder_shadow.h"

#include "gpu/encoder_shadow.h"

namespace mlxsae {
namespace {

/** The same bound with wider margins: sums in plain ops are not in a known order (cpu/kernel_screen.h has the terms).
 */
Arrays graph(const Arrays& in, mx::Stream s) {
  const auto& w = in[0];
  float d = static_cast<float>(w.shape(1)), gamma = 2 * (d + 16) * 5.97e-8f, up = 1 + 1e-4f + d * 1e-6f;
  auto low = mx::astype(w, mx::bfloat16, s);
  auto low32 = mx::astype(low, mx::float32, s);
  auto norm = [&](const mx::array& a) {
    return mx::multiply(mx::sqrt(mx::sum(mx::square(a, s), 1, false, s), s), mx::array(up), s);
  };
  auto full = norm(w);
  auto rest = mx::add(norm(mx::subtract(w, low32, s)), mx::multiply(norm(low32), mx::array(gamma), s), s);
  auto tiny = mx::multiply(mx::add(full, mx::array(1.0f), s), mx::array(4e-38f * d), s);
  return {low, mx::stack({full, mx::multiply(rest, mx::array(1.0001f), s), tiny}, 0, s)};
}

}  // namespace

std::pair<mx::array, mx::array> encoder_shadow(const mx::array& w_enc, mx::StreamOrDevice s_) {
  const char* op = "encoder_shadow";
  auto s = mx::to_stream(s_);
  check_matrix(op, "w_enc", w_enc);
  auto w = mx::stop_gradient(mx::astype(w_enc, mx::float32, s), s);
  auto define = [s](const Arrays& in) { return graph(in, s); };
  if (!has_kernel(op, s.device)) {
    auto out = define({w});
    return {out[0], out[1]};
  }
  auto primitive = std::make_shared<EncoderShadow>(s, define);
  Arrays inputs{normal(w, s)};
  auto out = mx::array::make_arrays(primitive->output_shapes(inputs), {mx::bfloat16, mx::float32}, primitive, inputs);
  return {out[0], out[1]};
}

void check_shadow(const char* op, const Shadow& shadow, const mx::array& w_enc) {
  int d_sae = w_enc.shape(0);
  if (w_enc.dtype() != mx::float32)
    fail(op, "w_enc must be float32 where a shadow is given but got ", w_enc.dtype(), ".");
  if (shadow.w16.dtype() != mx::bfloat16 || shadow.w16.shape() != w_enc.shape() ||
      shadow.columns.dtype() != mx::float32 || shadow.columns.shape() != mx::Shape{3, d_sae})
    fail(op, "shadow must be encoder_shadow(w_enc), bfloat16 ", w_enc.shape(), " and float32 [3, d_sae], but got ",
         shadow.w16.dtype(), " ", shadow.w16.shape(), " and ", shadow.columns.dtype(), " ", shadow.columns.shape(),
         ".");
}

gpu::Plan EncoderShadow::plan(const Arrays& in, const gpu::Device&) {
  return gpu::encoder_shadow(in[0].shape(0), in[0].shape(1), aligned_rows(in[0]));
}

}  // namespace mlxsae
