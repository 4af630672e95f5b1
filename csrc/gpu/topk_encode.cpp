#include "gpu/topk_encode.h"

#include <algorithm>

namespace mlxsae::gpu {

namespace {

constexpr int64_t kFilterSimdgroups = 8, kFinishThreads = 128;

/** One selection: its lists, and where its code goes. */
struct Selection {
  int64_t k, capacity;
  int lists, states, stage, values, indices;
};

}  // namespace

Plan topk_encode(const TopKEncodeSizes& s, const Device& device) {
  const auto& e = s.encode;
  Plan plan;
  EncodeInputs in{};
  in.x = plan.input("x", e.type, e.n * e.d_in);
  in.w = plan.input("w_enc", e.type, e.d_sae * e.d_in);
  in.bias = plan.input("b_enc", Type::f32, e.d_sae);
  bool aux = s.k_aux > 0;
  int mask = aux ? plan.input("mask", Type::boolean, e.d_sae) : -1;
  if (e.shadow) {
    in.w16 = plan.input("w16", Type::bf16, e.d_sae * e.d_in);
    in.columns = plan.input("columns", Type::f32, 3 * e.d_sae);
  }
  Selection selections[2];
  for (int q = 0; q <= aux; ++q) {
    auto& to = selections[q];
    to.k = q ? s.k_aux : s.k;
    to.values = plan.output(q ? "aux_values" : "values", e.type, e.n * to.k);
    to.indices = plan.output(q ? "aux_indices" : "indices", Type::u32, e.n * to.k);
  }
  if (e.n == 0) return plan;

  Products products(plan, e, in, device);
  // Few rows are shared out over more simdgroups, each of which filters a part of the features.
  int64_t parts = 1;
  if (products.chunks() == 1)
    parts =
        std::clamp<int64_t>(ceil_div(device.simdgroups, e.n), 1, std::min(kMaxParts, ceil_div(e.d_sae, kPartFeatures)));
  int64_t step = 4 * kSimd, width = ceil_div(ceil_div(products.chunk(), parts), step) * step;
  for (int q = 0; q <= aux; ++q) {
    auto& to = selections[q];
    // Room for k and a step of the filter; more of it means fewer cuts, and intervals that overlap need more.
    to.capacity = std::min(e.d_sae, (products.screened() ? 3 : 2) * to.k + 2 * step);
    std::string of = q ? "aux_" : "";
    to.lists = plan.temporary(of + "lists", Type::i32, e.n * parts * 3 * to.capacity);
    to.states = plan.temporary(of + "states", Type::i32, e.n * parts * 2);
    to.stage = plan.temporary(of + "stage", Type::i32, e.n * parts * 2 * to.capacity);
  }

  products.begin();
  std::string kernel = std::string("topk_filter") + (products.screened() ? "_exact" : "") + (aux ? "_aux" : "") + '_' +
                       metal_name(products.type()) + '_';
  if (products.screened()) kernel += metal_name(e.type) + std::string("_");
  for (int64_t c = 0; c < products.chunks(); ++c) {
    products.make(c);
    auto& filter = plan.launch("topk_encode", kernel + std::to_string(products.lanes(c)),
                               {ceil_div(e.n * parts, kFilterSimdgroups)}, {kFilterSimdgroups * kSimd});
    filter.read(0, products.buffer())
        .read(1, in.bias)
        .write(2, selections[0].lists)
        .write(3, selections[0].states)
        .argument(4, Words{word(e.n), word(products.width(c)), word(products.first(c)), word(parts), word(width),
                           word(s.k), word(selections[0].capacity), word(s.k_aux),
                           word(aux ? selections[1].capacity : int64_t{0}), word(e.d_in), word(int64_t{c == 0}),
                           word(products.cut()), word(products.least()), word(products.tiny())});
    if (aux) filter.read(5, mask).write(6, selections[1].lists).write(7, selections[1].states);
    if (products.screened())
      filter.read(8, in.x)
          .read(9, in.w)
          .read(10, products.rows())
          .read(11, products.columns())
          .read(12, products.edge(), 4 * c)
          .argument(13, static_cast<uint32_t>(e.d_sae));
  }
  std::string finish = std::string("topk_finish_") + (products.screened() ? "exact_" : "") + metal_name(e.type);
  if (products.screened()) finish += e.aligned ? "_4" : "_1";
  for (int q = 0; q <= aux; ++q) {
    auto& to = selections[q];
    plan.launch("topk_encode", finish, {e.n}, {kFinishThreads})
        .read(0, to.lists)
        .read(1, to.states)
        .write(2, to.stage)
        .write(3, to.values)
        .write(4, to.indices)
        .argument(5, Words{word(parts), word(to.k), word(to.capacity), word(e.d_in)})
        .read(6, in.x)
        .read(7, in.w)
        .read(8, in.bias);
  }
  return plan;
}

}  // namespace mlxsae::gpu
