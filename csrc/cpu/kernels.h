#pragma once
// What the instruction-set-specific kernels offer to eval_cpu. Plain pointers and sizes only: this header crosses
// between translation units that are compiled for different instruction sets.

#include <cstdint>

namespace mlxsae::cpu {

enum class Type : int { f32, f16, bf16 };

/** A row-contiguous matrix of any float type. */
struct Rows {
  const void* data;
  Type type;
  int64_t n, d;
};

/** Sparse codes, row by row: row t holds entries [t * k, (t + 1) * k), or [offsets[t], offsets[t + 1]) where given. */
struct Code {
  const void* values;  // null: every value is 1
  Type type;
  const uint32_t* indices;
  const int64_t* offsets;  // null: k per row
  int64_t n, k;
};

/** topk_encode over the tokens [t0, t1) and the features [f0, f1). */
struct Encode {
  Rows x, w;
  const float* bias;  // [d_sae] or null
  int64_t k;
  int64_t t0, t1, f0, f1;
  // Where f is the whole range: the codes. Otherwise, `keys`/`ids` [tokens, k] and `counts` of this range's candidates.
  void* values;
  Type values_type;
  uint32_t* indices;
  int32_t* keys;
  int32_t* ids;
  int32_t* counts;
};

/** Merges the candidates of `parts` feature ranges, given in ascending order, into the codes of tokens [t0, t1). */
struct Merge {
  const int32_t* keys;  // [parts, n, k]
  const int32_t* ids;
  const int32_t* counts;  // [parts, n]
  int64_t parts, n, k, t0, t1;
  void* values;
  Type values_type;
  uint32_t* indices;
};

/** Entries grouped by feature: those of feature j are [starts[j], starts[j + 1]), in ascending order of the row. */
struct ByFeature {
  const int64_t* starts;  // [d_sae + 1]
  const uint32_t* rows;   // [nnz]
  const float* values;    // [nnz]
};

struct Kernels {
  const char* isa;
  int token_block;  // tokens of one encode task that fill the tile and the cache well, at d_in = 1024

  void (*encode)(const Encode&);
  void (*merge)(const Merge&);
  /** out[t] = bias + sum_i values[t, i] * w[indices[t, i]] for t in [t0, t1), in the order of the slots. */
  void (*decode)(const Code&, const Rows& w, const void* bias, Type bias_type, void* out, Type out_type, int64_t t0,
                 int64_t t1);
  /** out[t, i] = <rows[t], w[indices[t, i]]> for t in [t0, t1). */
  void (*gather_dot)(const Rows& rows, const Rows& w, const Code&, void* out, Type out_type, int64_t t0, int64_t t1);
  /** out[j] = sum over the entries of feature j of value * rows[row], for j in [f0, f1). */
  void (*outer)(const ByFeature&, const Rows& rows, void* out, Type out_type, int64_t f0, int64_t f1);
};

/** The table for this machine: the best set it has, or the one that MLXSAE_CPU_ISA names. */
const Kernels& kernels();

}  // namespace mlxsae::cpu
