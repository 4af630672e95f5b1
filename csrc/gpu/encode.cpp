#include "gpu/encode.h"

#include <algorithm>

namespace mlxsae::gpu {

namespace {

constexpr int64_t kRowSimdgroups = 8, kChainSimdgroups = 2, kEdgeThreads = 256;
constexpr int64_t kChunkStep = 1024;  // chunks are multiples of it

}  // namespace

Products::Products(Plan& plan, const EncodeSizes& sizes, const EncodeInputs& in, const Device& device)
    : plan_(plan), sizes_(sizes), in_(in), few_(sizes.n <= kFewRows), screened_(sizes.exact && !few_) {
  type_ = few_ ? Type::f32 : sizes.shadow ? Type::bf16 : sizes.type;
  chunk_ = sizes.d_sae;
  if (!few_) {
    int64_t fit = device.chunk_bytes / (sizes.n * size_of(type_)) / kChunkStep * kChunkStep;
    chunk_ = std::min(chunk_, std::max(fit, kChunkStep));
  }
  input_cut_ = type_ == Type::f32 && device.tf32 ? 0x1p-10f : 0.0f;
  product_ = plan.temporary("product", type_, sizes.n * chunk_);
  if (!screened_) return;
  rows_ = plan.temporary("rows", Type::f32, 2 * sizes.n);
  edge_ = plan.temporary("edge", Type::f32, 4 * chunks());
  if (sizes.shadow) {
    x16_ = plan.temporary("x16", Type::bf16, sizes.n * sizes.d_in);
    columns_ = in.columns;
  } else {
    columns_ = plan.temporary("columns", Type::f32, 3 * sizes.d_sae);
  }
}

void Products::begin() {
  if (!screened_) return;
  auto n = static_cast<uint32_t>(sizes_.n), d = static_cast<uint32_t>(sizes_.d_in);
  auto d_sae = static_cast<uint32_t>(sizes_.d_sae);
  Size threads{kRowSimdgroups * kSimd};
  std::string kernel = sizes_.shadow ? "encode_round" : std::string("encode_rows_") + metal_name(sizes_.type);
  auto& rows = plan_.launch("encode_products", kernel + vectors(), {ceil_div(sizes_.n, kRowSimdgroups)}, threads)
                   .read(0, in_.x)
                   .write(1, rows_)
                   .argument(2, n)
                   .argument(3, d)
                   .argument(5, tiny());
  if (sizes_.shadow)
    rows.write(6, x16_);
  else
    rows.argument(4, input_cut_);
  if (!sizes_.shadow)
    plan_
        .launch("encode_products", std::string("encode_columns_") + metal_name(sizes_.type) + vectors(),
                {ceil_div(sizes_.d_sae, kRowSimdgroups)}, threads)
        .read(0, in_.w)
        .write(1, columns_)
        .argument(2, d_sae)
        .argument(3, d)
        .argument(4, input_cut_)
        .argument(5, tiny());
  plan_.launch("encode_products", "encode_edge", {chunks()}, {kEdgeThreads})
      .read(0, columns_)
      .read(1, in_.bias)
      .write(2, edge_)
      .argument(3, d_sae)
      .argument(4, static_cast<uint32_t>(chunk_));
}

void Products::make(int64_t c) {
  if (!few_) {
    plan_.matmul({sizes_.shadow ? x16_ : in_.x, sizes_.shadow ? in_.w16 : in_.w, product_, sizes_.n, width(c),
                  sizes_.d_in, first(c)});
    return;
  }
  int64_t rows = 1;
  while (rows < sizes_.n) rows *= 2;
  std::string kernel = std::string("encode_chain_") + metal_name(sizes_.type) +
                       (sizes_.aligned ? "_4_n" + std::to_string(rows) : "_1_n8");
  plan_
      .launch("encode_products", kernel, {ceil_div(sizes_.d_sae, kChainSimdgroups * kSimd)}, {kChainSimdgroups * kSimd})
      .read(0, in_.x)
      .read(1, in_.w)
      .write(2, product_)
      .argument(3, static_cast<uint32_t>(sizes_.n))
      .argument(4, static_cast<uint32_t>(sizes_.d_sae))
      .argument(5, static_cast<uint32_t>(sizes_.d_in));
}

}  // namespace mlxsae::gpu
