#include "gpu/code.h"

#include <algorithm>
#include <bit>

namespace mlxsae::gpu {

namespace {

// As in metal/code_sort.h.
constexpr int64_t kSortThreads = 256, kSortTile = 2048, kDigitBits = 8;

}  // namespace

std::string kernel_name(const char* base, std::optional<Type> type, bool aligned) {
  std::string name = base;
  if (type) name += std::string("_") + metal_name(*type);
  return name + '_' + std::to_string(lanes(aligned));
}

Sorted sort_code(Plan& plan, const std::vector<CodeBuffers>& codes, int64_t d_sae, bool firing) {
  const char* library = "code_sort";
  int64_t nnz = 0;
  for (auto& c : codes) nnz += c.size.room;
  struct Entries {
    int keys, rows, values;
  };
  auto entries = [&](const std::string& turn) {
    int64_t size = std::max<int64_t>(nnz, 1);
    return Entries{plan.temporary("keys" + turn, Type::u32, size), plan.temporary("rows" + turn, Type::u32, size),
                   plan.temporary("values" + turn, Type::f32, size)};
  };
  Entries from = entries("_0"), to = entries("_1");

  int64_t first = 0, first_row = 0;
  for (auto& c : codes) {
    if (c.size.room > 0)
      read_code(plan.launch(library, "code_keys", {ceil_div(c.size.room, kSortThreads)}, {kSortThreads}), 0, c)
          .write(3, from.keys)
          .write(4, from.rows)
          .write(5, from.values)
          .argument(6, static_cast<uint32_t>(c.size.n))
          .argument(7, c.size.slots())
          .argument(8, c.size.room)
          .argument(9, static_cast<uint32_t>(c.size.type))
          .argument(10, static_cast<uint32_t>(d_sae))
          .argument(11, static_cast<uint32_t>(first))
          .argument(12, static_cast<uint32_t>(first_row))
          .argument(13, firing);
    first += c.size.room, first_row += c.size.n;
  }

  // Keys go up to d_sae; the fewest passes, with digits of one width.
  int64_t key_bits = std::bit_width(static_cast<uint64_t>(d_sae)), passes = ceil_div(key_bits, kDigitBits);
  int64_t bits = ceil_div(key_bits, passes), digits = int64_t{1} << bits, tiles = ceil_div(nnz, kSortTile);
  int counts = plan.temporary("counts", Type::u32, std::max<int64_t>(digits * tiles, 1));
  int totals = plan.temporary("totals", Type::u32, digits);
  for (int64_t p = 0; p < passes && nnz > 0; ++p) {
    auto shift = static_cast<uint32_t>(p * bits), width = static_cast<uint32_t>(bits),
         size = static_cast<uint32_t>(nnz);
    plan.launch(library, "code_count", {tiles}, {kSortThreads})
        .read(0, from.keys)
        .write(1, counts)
        .argument(2, size)
        .argument(3, shift)
        .argument(4, width);
    plan.launch(library, "code_scan", {ceil_div(digits, kSortThreads / kSimd)}, {kSortThreads})
        .write(0, counts)
        .write(1, totals)
        .argument(2, static_cast<uint32_t>(tiles))
        .argument(3, width);
    plan.launch(library, "code_scatter", {tiles}, {kSortThreads})
        .read(0, from.keys)
        .read(1, from.rows)
        .read(2, from.values)
        .write(3, to.keys)
        .write(4, to.rows)
        .write(5, to.values)
        .read(6, counts)
        .read(7, totals)
        .argument(8, size)
        .argument(9, shift)
        .argument(10, width);
    std::swap(from, to);
  }
  int starts = plan.temporary("starts", Type::u32, d_sae + 1);
  plan.launch(library, "code_starts", {ceil_div(d_sae + 1, kSortThreads)}, {kSortThreads})
      .read(0, from.keys)
      .write(1, starts)
      .argument(2, static_cast<uint32_t>(nnz))
      .argument(3, static_cast<uint32_t>(d_sae));
  return {starts, from.rows, from.values};
}

}  // namespace mlxsae::gpu
