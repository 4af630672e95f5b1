#pragma once
// What the instruction-set-specific kernels offer to eval_cpu. Plain pointers and sizes only: this header crosses
// between translation units that are compiled for different instruction sets.

#include <cstdint>

namespace mlxsae::cpu {

enum class Type : int { f32, f16, bf16 };

/** Throws std::bad_alloc; out of line, so that no instruction set's file emits code of the standard library. */
[[noreturn]] void throw_bad_alloc();

/** What the numbers of an encoder's shadow are (kernel_screen.h). */
enum class ShadowType : int { bf16, i16, i8 };

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
  const int64_t* offsets;  // [n + 1]; null: k per row
  int64_t n, k;
  int64_t room;  // length of values and indices; entries past the last row are unused

  int64_t size() const { return offsets ? offsets[n] : n * k; }
};

/** Where codes go: values and indices [n, k]; or, of a part of the features, candidates to be merged. */
struct Codes {
  int64_t k;
  void* values;
  Type type;
  uint32_t* indices;
  int32_t* keys;  // [n, room], null where the codes are final
  int32_t* ids;
  int32_t* counts;  // [n]
  int64_t room;
};

/** topk_encode over the tokens [t0, t1) and the features [f0, f1). */
struct Encode {
  Rows x, w;
  const float* bias;  // [d_sae] or null
  int64_t k;
  const bool* mask;  // [d_sae] or null: the features of a second selection
  int64_t k_aux;
  int64_t t0, t1, f0, f1;
  Codes out, aux;
};

/**
 * Every pre-activation of the tokens [t0, t1) and the features [f0, f1) that is not <= its bound goes to
 * take(self, token, feature, value); those of one token come in ascending order of the feature.
 */
struct Above {
  Rows x, w;
  const float* bias;    // [d_sae] or null
  const float* bounds;  // [d_sae], or null: `bound` for all
  float bound;
  int64_t t0, t1, f0, f1;
  void* self;
  void (*take)(void* self, int64_t token, int64_t feature, float value);
};

/** Merges the candidates of `parts` feature ranges, [parts, n, room] in ascending order, into the codes of [t0, t1). */
struct Merge {
  Codes out;
  int64_t parts, n, t0, t1;
};

/**
 * The screen of the tokens [t0, t1) (kernel_screen.h): features that may be among the k largest, or, where k
 * is 0, that may reach `floor`.
 */
struct Screen {
  const float* x;  // [n, d]
  int64_t d, d_sae, k, capacity;
  float floor;
  const uint16_t* w16;   // [d_sae, d]; of i8 the high bytes of a row and then its low ones. Null: to be made of w
  const float* columns;  // [3, d_sae], of i8 [6, d_sae]
  const float* w;        // [d_sae, d]
  float* made;           // without w16: columns 0 and 2 of what is made, [3, d_sae]
  bool* unusable;        // without w16: set where a norm is not finite, or too large
  const float* bias;     // [d_sae] or null
  const float* bounds;   // [d_sae], which are taken off the bias; or null
  int64_t t0, t1;
  int32_t* ids;     // [n, capacity], in the order of the walk
  float* upper;     // [n, capacity] where k > 0: upper ends; infinite where the lower end is among the k largest
  int32_t* counts;  // [n]; -1 where the token needs the float32 kernel
  float* norms;     // [n] |x|, rounded up
};

/** Pre-activations of single (row, feature) pairs. */
struct Rescore {
  const float *x, *w, *bias;
  int64_t d;
  const uint32_t *rows, *ids;  // sorted by feature, for locality
  float* out;
};

/** Entries grouped by feature: those of feature j are [starts[j], starts[j + 1]), in ascending order of the row. */
struct ByFeature {
  const int64_t* starts;  // [d_sae + 1]
  const uint32_t* rows;   // [nnz]
  const float* values;    // [nnz]
};

/** The parameters of one feature-major weight matrix or bias, with its Adam moments. */
struct Param {
  float* w;
  void *m, *v;
  Type moments;   // float32 or bfloat16
  uint32_t seed;  // of the noise that rounds them to bfloat16
};

/** Entries of one reconstruction: out[row] += value * w_dec[feature], whose gradient is scale * residual. */
struct Term {
  ByFeature by;
  const float* residual;  // [n, d_out]
  float scale;
};

struct Adam {
  float beta1, beta2, eps;
  float step_size;      // lr / (1 - beta1^t)
  float inv_sqrt_bias;  // 1 / sqrt(1 - beta2^t)
};

/** The feature-major backward pass and update of [f0, f1) (kernel_update.h). */
struct Update {
  const float* x;  // [n, d_in], what the encoder saw
  int64_t d_in, d_out;
  const Term* terms;  // the main one, then those without a bias
  int n_terms;
  Param w_enc, b_enc, w_dec;
  Adam adam;
  bool project, normalize;
  bool keep_encoder, keep_decoder;  // w_enc and b_enc, w_dec of features without entries stay what they are
  float clip;                       // factor on every gradient
  bool norms_only;                  // sums up, but changes nothing
  int64_t f0, f1;
  const uint8_t* apart;  // [d_sae], features that the walk leaves out; or null
  uint16_t* w16;         // the encoder's new shadow [d_sae, d_in] and columns [3, d_sae], or null
  float* columns;
  ShadowType shadow_type;
  int64_t d_sae;
  float* through_input;  // [d_in] += sum_j db_enc[j] * w_enc[j], or null
  double* square;        // += squares of all gradients, before the clip
};

/** The steps that rows [f0, f1) of a decoder have missed, where `rows` asks for them (kernel_update.h). */
struct CatchUp {
  Param w_dec;
  int32_t* last_step;        // [d_sae], the last step that a row has made
  const bool* rows;          // [d_sae]
  const float* corrections;  // [n_corrections, 2]: step size (NaN: a skipped step), inv_sqrt_bias, up to `step`
  int64_t n_corrections;
  int step;
  int64_t d_out;
  bool normalize;
  Adam adam;  // but for what the step decides
  int64_t f0, f1;
};

/** c[i][j] += sum_k a[i][k] b[k][j], with b in panels of `Kernels::panel` columns (kernel_dense.h). */
struct Product {
  const float* a;
  int64_t lda;
  const uint32_t* which;  // rows of a, or null: all in their order
  const float* panels;    // [columns / panel][depth][panel]
  int64_t depth, columns;
  float* c;
  int64_t ldc;
};

/** Features that are updated from gradients in memory, by their place in `features`. */
struct Apart {
  const uint32_t* features;
  int64_t begin, end;
  float *dec, *enc, *bias;  // [.., dec_stride], [.., enc_stride], [..]
  int64_t dec_stride, enc_stride;
};

struct Kernels {
  const char* isa;
  int panel;         // columns of a packed panel of `product`
  int token_block;   // two panels: tokens of one encode task that fill the tile and the cache well, at d_in = 1024
  int screen_block;  // the same for the screen
  int making_block;  // the same for a screen that makes the shadow, which every task does for itself
  int making_width;  // d from which on that pays

  void (*encode)(const Encode&);
  void (*merge)(const Merge&);
  void (*above)(const Above&);
  /** out[t] = bias + sum_i values[t, i] * w[indices[t, i]] for t in [t0, t1), in the order of the slots. */
  void (*decode)(const Code&, const Rows& w, const void* bias, Type bias_type, void* out, Type out_type, int64_t t0,
                 int64_t t1);
  /** out[t, i] = <rows[t], w[indices[t, i]]> for t in [t0, t1). */
  void (*gather_dot)(const Rows& rows, const Rows& w, const Code&, void* out, Type out_type, int64_t t0, int64_t t1);
  /** out[j] = sum over the entries of feature j of value * rows[row], for j in [f0, f1). */
  void (*outer)(const ByFeature&, const Rows& rows, void* out, Type out_type, int64_t f0, int64_t f1);
  void (*update)(const Update&);
  /** The two halves of `update` for single features: gradients of the terms; what follows once they are complete. */
  void (*gather)(const Update&, const Apart&);
  void (*finish)(const Update&, const Apart&);
  void (*catch_up)(const CatchUp&);
  void (*product)(const Product&, int64_t i0, int64_t i1, int64_t p);
  bool (*panel_of)(const float* rows, const uint32_t* which, int64_t n, int64_t d, float* out, int64_t p);
  void (*turned_panel_of)(const float* rows, int64_t n, int64_t d, float* out, int64_t p);
  float (*entries_of)(float* values, float* dz, float scale, int64_t n);
  void (*screen[3])(const Screen&);  // by the ShadowType; null where the instruction set has no product of such numbers
  ShadowType shadow_type;            // the one that it screens fastest with
  void (*shadow)(const float* w, int64_t d_sae, int64_t d, ShadowType type, uint16_t* out, float* columns, int64_t f0,
                 int64_t f1);
  void (*estimate)(const Rescore&, int64_t begin, int64_t end);  // in any order of additions
  void (*rescore)(const Rescore&, int64_t begin, int64_t end);   // in the order of encode: its bits
  /** One Adam step on d numbers with gradient g * clip. */
  void (*adam)(const Param&, const float* g, float clip, const Adam&, int64_t d);
  /** residual[t] -= target[t], square[t] = |residual[t]|^2; and the same with residual[t] = decode(t) before, all
   * float32. */
  void (*subtract)(const float* target, int64_t d, float* residual, float* square, int64_t t0, int64_t t1);
  void (*residual)(const Code&, const float* w, const float* bias, const float* target, int64_t d, float* residual,
                   float* square, int64_t t0, int64_t t1);
};

/** Integers in the order of floats; both zeros are one, NaN is the largest (the same as in kernel_encode.h). */
int32_t order_key(float v);

/** The table for this machine: the best set it has, or the one that MLXSAE_CPU_ISA names. */
const Kernels& kernels();

}  // namespace mlxsae::cpu
