#pragma once
// Sparse codes in plans, and the sort of their entries by feature.

#include <optional>

#include "gpu/plan.h"

namespace mlxsae::gpu {

/** The numbers that each thread takes of a row (metal/common/lanes.h). */
constexpr int64_t lanes(bool aligned) { return aligned ? 4 : 1; }

/** "sparse_decode", f16, aligned: "sparse_decode_half_4"; without a type "decode_residual_4". */
std::string kernel_name(const char* base, std::optional<Type> type, bool aligned);

/** The type that two floating types promote to. */
inline Type promoted(Type a, Type b) { return a == b ? a : Type::f32; }

/** A code of n rows: k slots each, or compressed rows. `room` is the length of its values and indices. */
struct CodeSize {
  int64_t n, k, room;
  bool compressed;
  Type type = Type::f32;

  uint32_t slots() const { return compressed ? 0xffffffffu : static_cast<uint32_t>(k); }  // kCompressed of code.h
  int64_t mean() const { return compressed ? ceil_div(room, n > 0 ? n : 1) : k; }
};

/** A code's buffers; offsets -1 (no buffer, see Binding) where it has none. */
struct CodeBuffers {
  CodeSize size;
  int values, indices, offsets;
};

/** Binds the code's three buffers at `index` and after. */
inline Launch& read_code(Launch& launch, int index, const CodeBuffers& code) {
  return launch.read(index, code.values).read(index + 1, code.indices).read(index + 2, code.offsets);
}

/** Compressed columns: entries sorted by feature, in each by row. */
struct Sorted {
  int starts;  // [d_sae + 1] uint
  int rows, values;
};

/**
 * Sorts the entries of codes with the same features; the rows of the second follow those of the first. Entries of value
 * 0 are left out; where `firing`, all that are not positive (NaN stays). Indices that name no feature are left out.
 */
Sorted sort_code(Plan& plan, const std::vector<CodeBuffers>& codes, int64_t d_sae, bool firing);

}  // namespace mlxsae::gpu
