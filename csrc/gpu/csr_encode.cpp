#include "gpu/csr_encode.h"

#include <algorithm>

namespace mlxsae::gpu {

namespace {

constexpr const char* kLibrary = "csr_encode";
constexpr int64_t kUnitSimdgroups = 8, kSettleSimdgroups = 4, kScanThreads = 1024, kElementThreads = 256;
constexpr int64_t kDigitBins = 2048, kDigitThreads = 256, kMaxGroups = 64;
// The digits of a positive key of 31 bits, from the highest.
constexpr struct {
  uint32_t shift, bits;
} kDigits[] = {{20, 11}, {10, 10}, {0, 10}};

/** Either encoder: the rule is "the room largest of all", or "above bounds, the first room". */
Plan csr_encode(const EncodeSizes& e, int64_t room, bool batch, const Device& device) {
  Plan plan;
  EncodeInputs in{};
  in.x = plan.input("x", e.type, e.n * e.d_in);
  in.w = plan.input("w_enc", e.type, e.d_sae * e.d_in);
  in.bias = plan.input("b_enc", Type::f32, e.d_sae);
  int rule = batch ? plan.input("hint", Type::f32, 1) : plan.input("bounds", Type::f32, e.d_sae);
  if (e.shadow) {
    in.w16 = plan.input("w16", Type::bf16, e.d_sae * e.d_in);
    in.columns = plan.input("columns", Type::f32, 3 * e.d_sae);
  }
  int values = plan.output("values", e.type, room), indices = plan.output("indices", Type::u32, room);
  int ends = plan.output("offsets", Type::i64, e.n + 1);
  int number = batch ? plan.output("threshold", Type::f32, 1) : plan.output("count", Type::i64, 1);
  bool empty = e.n == 0 || e.d_sae == 0;

  // Kept entries before and after a chunk.
  int kept_ids[2], kept_keys[2], offsets[2];
  int64_t parts = 1, units = 0;
  std::string name = batch ? "batch" : "threshold";
  Size by_unit{1}, unit_threads{kUnitSimdgroups * kSimd};
  auto kept = [&](int64_t size) {
    for (int i = 0; i < 2; ++i) {
      std::string at = std::to_string(i);
      kept_ids[i] = plan.temporary("kept_ids" + at, Type::u32, std::max<int64_t>(room, 1));
      kept_keys[i] = plan.temporary("kept_keys" + at, Type::i32, std::max<int64_t>(room, 1));
      offsets[i] = plan.temporary("offsets" + at, Type::u32, size + 1);
    }
  };
  int now = 0, state = -1;
  if (empty) {
    kept(0);
    state = plan.temporary("state", Type::i32, 8);
  } else {
    Products products(plan, e, in, device);
    bool exact = products.screened();
    if (products.chunks() == 1)
      parts = std::clamp<int64_t>(ceil_div(device.simdgroups, e.n), 1,
                                  std::min(kMaxParts, ceil_div(e.d_sae, kPartFeatures)));
    units = e.n * parts;
    by_unit = {ceil_div(units, kUnitSimdgroups)};
    int64_t width = ceil_div(ceil_div(products.chunk(), parts), 4) * 4;
    kept(units);
    int ids = plan.temporary("fresh_ids", Type::u32, units * width);
    int low = plan.temporary("fresh_low", Type::i32, units * width);
    int up = exact ? plan.temporary("fresh_up", Type::i32, units * width) : -1;
    int counts = plan.temporary("counts", Type::u32, units);
    int bins = -1, tallies = -1, quotas = -1;
    if (batch) {
      state = plan.temporary("state", Type::i32, 8);
      bins = plan.temporary("bins", Type::u32, kDigitBins);
      tallies = plan.temporary("tallies", Type::u32, 2 * units);
      quotas = plan.temporary("quotas", Type::u32, units);
      plan.launch(kLibrary, "csr_clear", {kDigitBins / kDigitThreads}, {kDigitThreads}).write(0, bins);
    }
    products.begin();
    for (int64_t c = 0; c < products.chunks(); ++c, now ^= 1) {
      products.make(c);
      int before = now ^ 1;  // what is kept before this chunk
      Words sizes{word(e.n),
                  word(products.width(c)),
                  word(products.first(c)),
                  word(parts),
                  word(width),
                  word(room),
                  word(e.d_in),
                  word(e.d_sae),
                  word(int64_t{c == 0}),
                  word(products.cut()),
                  word(products.least()),
                  word(products.tiny())};
      auto digit_sizes = [&](uint32_t shift, uint32_t bits) {
        return Words{word(units), word(width), word(room), word(int64_t{c == 0}), shift, bits};
      };
      // Kept entries are not read at the first chunk; a buffer is bound all the same.
      auto& filter = plan.launch(kLibrary,
                                 "csr_filter_" + name + (exact ? "_exact_" : "_") + metal_name(products.type()) + '_' +
                                     std::to_string(products.lanes(c)),
                                 by_unit, unit_threads)
                         .read(0, products.buffer())
                         .read(1, in.bias)
                         .write(2, ids)
                         .write(3, low)
                         .write(4, counts)
                         .argument(5, sizes)
                         .read(6, batch ? state : rule);
      if (exact) filter.write(7, up).read(8, products.rows()).read(9, products.columns());
      auto find_cut = [&] {
        for (auto [shift, bits] : kDigits) {
          plan.launch(kLibrary, "csr_count_digits", {std::clamp<int64_t>(units / kUnitSimdgroups, 1, kMaxGroups)},
                      {kDigitThreads})
              .read(0, kept_keys[before])
              .read(1, offsets[before])
              .read(2, low)
              .read(3, counts)
              .read(4, state)
              .write(5, bins)
              .argument(6, digit_sizes(shift, bits));
          plan.launch(kLibrary, "csr_next_digit", {1}, {kDigitThreads})
              .write(0, bins)
              .write(1, state)
              .argument(2, digit_sizes(shift, bits));
        }
      };
      if (exact) {
        if (batch) find_cut();  // among lower ends: it bounds the true one
        plan.launch(kLibrary, "csr_settle_" + name + '_' + metal_name(e.type) + (e.aligned ? "_4" : "_1"),
                    {ceil_div(units, kSettleSimdgroups)}, {kSettleSimdgroups * kSimd})
            .read(0, in.x)
            .read(1, in.w)
            .read(2, in.bias)
            .write(3, ids)
            .write(4, low)
            .read(5, up)
            .write(6, counts)
            .argument(7, sizes)
            .read(8, batch ? state : rule);
      }
      if (batch) {
        find_cut();
        plan.launch(kLibrary, "csr_tally", by_unit, unit_threads)
            .read(0, kept_keys[before])
            .read(1, offsets[before])
            .read(2, low)
            .read(3, counts)
            .read(4, state)
            .write(5, tallies)
            .argument(6, digit_sizes(0, 0));
        plan.launch(kLibrary, "csr_scan_batch", {1}, {kScanThreads})
            .read(0, tallies)
            .read(1, state)
            .write(2, quotas)
            .write(3, offsets[now])
            .argument(4, digit_sizes(0, 0));
      } else {
        plan.launch(kLibrary, "csr_scan_threshold", {1}, {kScanThreads})
            .read(0, offsets[before])
            .read(1, counts)
            .write(2, offsets[now])
            .write(3, number)
            .argument(4, digit_sizes(0, 0));
      }
      auto& merge = plan.launch(kLibrary, "csr_merge_" + name, by_unit, unit_threads)
                        .read(0, kept_ids[before])
                        .read(1, kept_keys[before])
                        .read(2, offsets[before])
                        .read(3, ids)
                        .read(4, low)
                        .read(5, counts)
                        .read(6, offsets[now])
                        .write(7, kept_ids[now])
                        .write(8, kept_keys[now])
                        .argument(9, digit_sizes(0, 0));
      if (batch) merge.read(10, state).read(11, quotas);
    }
    now ^= 1;  // the last one that was written
  }

  Words sizes{word(e.n), word(parts), word(room), word(int64_t{empty})};
  plan.launch(kLibrary, std::string("csr_write_") + metal_name(e.type),
              {ceil_div(std::max(room, e.n + 1), kElementThreads)}, {kElementThreads})
      .read(0, kept_ids[now])
      .read(1, kept_keys[now])
      .read(2, offsets[now])
      .write(3, values)
      .write(4, indices)
      .write(5, ends)
      .argument(6, sizes);
  if (batch)
    plan.launch(kLibrary, "csr_least", {1}, {kScanThreads})
        .read(0, kept_keys[now])
        .read(1, offsets[now])
        .read(2, state)
        .write(3, number)
        .argument(4, sizes);
  else if (empty)
    plan.launch(kLibrary, "csr_no_entries", {1}, {1}).write(0, number);
  return plan;
}

}  // namespace

Plan batch_topk_encode(const BatchTopKEncodeSizes& s, const Device& device) {
  return csr_encode(s.encode, s.k * s.encode.n, true, device);
}

Plan threshold_encode(const ThresholdEncodeSizes& s, const Device& device) {
  return csr_encode(s.encode, s.capacity, false, device);
}

}  // namespace mlxsae::gpu
