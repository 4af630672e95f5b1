#include "gpu/feature_update.h"

#include <algorithm>
#include <array>

namespace mlxsae::gpu {

namespace {

// As in metal/feature_update.h and metal/common/reduce.h.
enum Flag : uint32_t {
  project = 1,
  normalize = 2,
  through_input = 4,
  sums = 8,
  dry = 16,
  shadow = 32,
  keep_encoder = 64,
  keep_decoder = 128
};
constexpr int64_t kPieces = 4, kMaxSimdgroups = 16, kSumSimdgroups = 8, kScales = 8;

// The features are cut into parts that do not depend on the chip, because the sums over them are rounded by part. So
// many keep the largest GPU busy a few times over; their partial sums stay below one hundredth of the parameters.
constexpr int64_t kMaxRanges = 2048, kFeaturesOfRange = 16;
constexpr int64_t kRowsOfChunk = 64;  // of the residual, summed up by one threadgroup

using Four = std::array<int, 4>;  // w_enc, b_enc, w_dec, b_dec

}  // namespace

Plan feature_update(const FeatureUpdateSize& s, const FeatureUpdateOptions& o) {
  const char* library = "feature_update";
  Plan plan;
  const std::array<int64_t, 4> sizes{s.d_sae * s.d_in, s.d_sae, s.d_sae * s.d_out, s.d_out};
  const std::array<const char*, 4> names{"w_enc", "b_enc", "w_dec", "b_dec"};

  int x = plan.input("x", Type::f32, s.n * s.d_in), loss = plan.input("loss", Type::f32, 1);
  std::vector<int> residuals, scales;
  std::vector<CodeBuffers> codes;
  for (auto& code : s.terms) {
    residuals.push_back(plan.input("residual", Type::f32, s.n * s.d_out));
    int values = plan.input("values", Type::f32, code.room);
    codes.push_back({code, values, plan.input("indices", Type::u32, code.room), -1});
    scales.push_back(plan.input("scale", Type::f32, 1));
  }
  for (auto& code : codes)
    if (code.size.compressed) code.offsets = plan.input("offsets", Type::i64, code.size.n + 1);
  auto four_inputs = [&](const char* prefix, Type matrices) {
    Four ids;
    for (int i = 0; i < 4; ++i)
      ids[i] = plan.input(std::string(prefix) + names[i], i % 2 ? Type::f32 : matrices, sizes[i]);
    return ids;
  };
  auto four_outputs = [&](const char* prefix, const Four& donors) {
    Four ids;
    for (int i = 0; i < 4; ++i)
      ids[i] = plan.output(std::string(prefix) + names[i], plan.buffers[donors[i]].type, sizes[i], donors[i]);
    return ids;
  };
  const Four p = four_inputs("", Type::f32), m = four_inputs("m_", s.moments), v = four_inputs("v_", s.moments);
  int old_w16 = s.shadow ? plan.input("w16", Type::bf16, sizes[0]) : -1;
  int old_columns = s.shadow ? plan.input("columns", Type::f32, 3 * s.d_sae) : -1;
  const Four p_out = four_outputs("", p), m_out = four_outputs("m_", m), v_out = four_outputs("v_", v);
  int grad_norm = plan.output("grad_norm", Type::f32, 1);
  int w16 = s.shadow ? plan.output("w16", Type::bf16, sizes[0], old_w16) : -1;
  int columns = s.shadow ? plan.output("columns", Type::f32, 3 * s.d_sae, old_columns) : -1;

  const auto terms = static_cast<int64_t>(s.terms.size());
  int control = plan.temporary("control", Type::f32, kScales + terms);
  plan.launch(library, "update_begin", {}, {kSimd})
      .read(0, loss)
      .write(1, control)
      .argument(2, o.beta1)
      .argument(3, o.beta2)
      .argument(4, o.eps)
      .argument(5, o.step_size)
      .argument(6, o.inv_sqrt_bias)
      .argument(7, o.seed);
  // One array for the residuals of all auxiliary terms: that of the one term, or a copy.
  int64_t size = s.n * s.d_out;
  int auxiliary = terms == 1   ? -1
                  : terms == 2 ? residuals[1]
                               : plan.temporary("residuals", Type::f32, std::max<int64_t>((terms - 1) * size, 1));
  for (int64_t q = 0; q < terms; ++q) {
    bool copied = terms > 2 && q > 0;
    plan.launch(library, "update_term", {copied ? std::clamp<int64_t>(ceil_div(size, 1024), 1, 1024) : 1}, {256})
        .read(0, scales[q])
        .read(1, residuals[q])
        .write(2, control)
        .write(3, copied ? auxiliary : -1, copied ? (q - 1) * size : 0)
        .argument(4, static_cast<uint32_t>(q))
        .argument(5, copied ? size : int64_t{0});
  }
  Sorted by = sort_code(plan, codes, s.d_sae, true);

  // A row of a simdgroup's registers, else of a threadgroup's, else blocks of it.
  int64_t width = lanes(s.aligned) * kSimd, needed = ceil_div(std::max(s.d_in, s.d_out), kPieces * width);
  int64_t parts = std::clamp<int64_t>(s.d_sae / kFeaturesOfRange, 1, kMaxRanges), blocks = ceil_div(s.d_out, width);
  bool wide = needed > kMaxSimdgroups, single = needed <= 1;
  const char* kernel = wide     ? "feature_update_wide"
                       : single ? "feature_update_simdgroup"
                                : "feature_update_threadgroup";
  int64_t simdgroups = single ? 8 : std::min(needed, kMaxSimdgroups);
  int db = plan.temporary("db_enc", Type::f32, s.d_sae);
  int through = o.through_input ? plan.temporary("through", Type::f32, parts * s.d_in) : -1;
  int squares = plan.temporary("squares", Type::f32, parts + blocks);
  int products = wide ? plan.temporary("products", Type::f32, plan.buffers[by.values].size) : -1;
  const uint32_t flags = (o.project ? project : 0u) | (o.normalize ? normalize : 0u) |
                         (o.through_input ? through_input : 0u) | (s.shadow ? shadow : 0u) |
                         (o.keep_encoder ? keep_encoder : 0u) | (o.keep_decoder ? keep_decoder : 0u);

  auto walk = [&](uint32_t how) {
    auto& launch = plan.launch(library, kernel_name(kernel, s.moments, s.aligned),
                               {single ? ceil_div(parts, simdgroups) : parts}, {kSimd * simdgroups});
    launch.read(0, x)
        .read(1, residuals.front())
        .read(2, auxiliary)
        .read(3, by.starts)
        .read(4, by.rows)
        .read(5, by.values)
        .read(6, control);
    int index = 7;
    for (int i : {0, 2}) launch.read(index, p[i]).read(index + 1, m[i]).read(index + 2, v[i]), index += 3;
    for (int i : {0, 2})
      launch.write(index, p_out[i]).write(index + 1, m_out[i]).write(index + 2, v_out[i]), index += 3;
    launch.write(19, w16)
        .write(20, columns)
        .write(21, db)
        .write(22, through)
        .write(23, squares)
        .argument(24, static_cast<uint32_t>(s.n))
        .argument(25, static_cast<uint32_t>(s.d_in))
        .argument(26, static_cast<uint32_t>(s.d_out))
        .argument(27, static_cast<uint32_t>(s.d_sae))
        .argument(28, static_cast<uint32_t>(parts))
        .argument(29, flags | how);
    if (wide) launch.write(30, products);
    if ((how & dry) || !(o.keep_encoder || o.keep_decoder) || s.d_sae == 0) return;
    auto& spared = plan.launch(library, kernel_name("update_spared", s.moments, s.aligned), {s.d_sae},
                               {kSimd * std::clamp<int64_t>(ceil_div(std::max(s.d_in, s.d_out), width), 1, 8)});
    spared.read(0, by.starts).read(1, control);
    index = 2;
    for (int i : {0, 2}) spared.read(index, p[i]).read(index + 1, m[i]).read(index + 2, v[i]), index += 3;
    for (int i : {0, 2})
      spared.write(index, p_out[i]).write(index + 1, m_out[i]).write(index + 2, v_out[i]), index += 3;
    spared.write(14, w16)
        .write(15, columns)
        .argument(16, static_cast<uint32_t>(s.d_in))
        .argument(17, static_cast<uint32_t>(s.d_out))
        .argument(18, static_cast<uint32_t>(s.d_sae))
        .argument(19, flags);
  };
  bool clip = o.clip_norm > 0;
  walk(clip ? sums | dry : sums);

  int64_t chunks = ceil_div(s.n, kRowsOfChunk);
  int chunk_sums = chunks > 0 ? plan.temporary("chunk_sums", Type::f32, chunks * s.d_out) : -1;
  int gradient = plan.temporary("db_dec", Type::f32, s.d_out);
  if (chunks > 0)
    plan.launch(library, kernel_name("residual_sums", std::nullopt, s.aligned), {blocks, chunks},
                {kSimd * kSumSimdgroups})
        .read(0, residuals.front())
        .write(1, chunk_sums)
        .argument(2, static_cast<uint32_t>(s.n))
        .argument(3, static_cast<uint32_t>(s.d_out))
        .argument(4, static_cast<uint32_t>(kRowsOfChunk));
  plan.launch(library, kernel_name("bias_gradient", std::nullopt, s.aligned), {blocks}, {kSimd * kSumSimdgroups})
      .read(0, chunk_sums)
      .read(1, through)
      .read(2, control)
      .write(3, gradient)
      .write(4, squares)
      .argument(5, static_cast<uint32_t>(s.d_out))
      .argument(6, static_cast<uint32_t>(chunks))
      .argument(7, static_cast<uint32_t>(parts))
      .argument(8, flags);
  plan.launch(library, "update_end", {}, {512})
      .read(0, squares)
      .read(1, gradient)
      .write(2, control)
      .read(3, p[3])
      .read(4, m[3])
      .read(5, v[3])
      .write(6, p_out[3])
      .write(7, m_out[3])
      .write(8, v_out[3])
      .write(9, grad_norm)
      .argument(10, static_cast<uint32_t>(parts + blocks))
      .argument(11, static_cast<uint32_t>(s.d_out))
      .argument(12, o.clip_norm);
  plan.launch(library, "step_b_enc", {ceil_div(s.d_sae, 256)}, {256})
      .read(0, db)
      .read(1, control)
      .read(2, p[1])
      .read(3, m[1])
      .read(4, v[1])
      .write(5, p_out[1])
      .write(6, m_out[1])
      .write(7, v_out[1])
      .argument(8, static_cast<uint32_t>(s.d_sae))
      .read(9, by.starts)
      .argument(10, flags);
  if (clip) walk(0);
  return plan;
}

}  // namespace mlxsae::gpu
