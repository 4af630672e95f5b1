#pragma once
// mlxsae's operations on MLX arrays. Every weight is feature-major: an encoder is [d_sae, d_in], a decoder
// [d_sae, d_out], a feature a row. Floating types are float32, float16 and bfloat16 in any mixture; accumulation is in
// float32.
//
// A sparse code is a pair (values [n, k], indices [n, k] uint32); a slot with value 0 is unused. Where the number of
// entries varies from row to row it is (values [nnz], indices [nnz]) with offsets [n + 1] int64: row t holds the
// entries offsets[t] to offsets[t + 1], offsets[0] = 0, and entries from offsets[n] on are in no row and never looked
// at. Every op on codes takes such offsets; ones that do not ascend from 0 to at most nnz raise std::runtime_error when
// the result is evaluated (on the CPU).
//
// All ops but `tokens_since_fired` and `feature_update` have derivatives (vjp, jvp) of every order, and vmap. On a
// device without a kernel of its own an op is a graph of plain MLX ops; `kernel_for` tells.

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"
#include "mlxsae/version.h"

#if defined(__GNUC__)
#define MLXSAE_API __attribute__((visibility("default")))
#else
#define MLXSAE_API
#endif

namespace mlxsae {

/** A float32 encoder in 8 or 16 bits, with what bounds the error of products with it (encoder_shadow). */
struct Shadow {
  mlx::core::array w16;      // [d_sae, d_in] bfloat16 or int16, or [d_sae, 2 d_in] int8
  mlx::core::array columns;  // [3, d_sae] float32, [6, d_sae] for int8
};

/**
 * The shadow of w_enc, for certified encoding. It must be made anew whenever w_enc changes.
 *
 * dtype is bfloat16; or, on the CPU only, int16: row j is then integers in units of columns[0, j] 2^-15, where
 * columns[0] is |w_enc[j]|, rounded up; or int8: d_in high bytes and d_in low ones of the integers columns[3, j] high +
 * low, in units of columns[0, j] (1 + 2^-6) 2^-15. By default it is what the device screens fastest with: int8 on x86
 * with VNNI, int16 on other x86.
 */
MLXSAE_API std::pair<mlx::core::array, mlx::core::array> encoder_shadow(
    const mlx::core::array& w_enc, std::optional<mlx::core::Dtype> dtype = std::nullopt,
    mlx::core::StreamOrDevice s = {});

/**
 * The k largest pre-activations of each row, then relu.
 *
 *   pre = x w_enc^T + b_enc          [n, d_sae], never stored
 *   indices[t] = places of the k largest of pre[t], ascending; of equal ones the lowest place is taken
 *   values[t, i] = max(pre[t, indices[t, i]], 0)
 *
 * x [n, d_in], w_enc [d_sae, d_in], b_enc [d_sae], 0 < k <= d_sae. Selection is on float32 pre-activations, each one
 * chain of fused multiply-adds over ascending coordinates plus the bias; values are then rounded to the promoted type
 * of x and w_enc. NaN counts as the largest value and stays NaN. The derivative is that of the selected entries, and
 * zero where the value is not positive.
 *
 * With a shadow the product runs in 16 bits where the processor has one for the shadow's type; a proven bound decides
 * which features are computed again in float32, so that the result has the same bits ("certified"). On a GPU float32
 * operands are always treated so, with MLX's own product, unless `tf32` lets that product decide as it is: on GPUs
 * where MLX multiplies float32 in TF32 (products_are_tf32) the result is TF32's, on others that of another order of
 * additions. Operands of 16 bits, of more than eight rows, are never screened on a GPU: selection is on MLX's product,
 * which has their type. Both are fast and not exact. On the CPU `tf32` changes nothing.
 *
 * Throws std::invalid_argument for other ranks, sizes, types or k.
 */
MLXSAE_API std::pair<mlx::core::array, mlx::core::array> topk_encode(
    const mlx::core::array& x, const mlx::core::array& w_enc, const std::optional<mlx::core::array>& b_enc, int k,
    const std::optional<Shadow>& shadow = std::nullopt, bool tf32 = false, mlx::core::StreamOrDevice s = {});

/**
 * topk_encode, and from the same product a second selection: the k_aux largest among the features where mask [d_sae]
 * (bool) is true. Returns values, indices, aux values [n, k_aux], aux indices. Where fewer than k_aux features are
 * masked the other slots are unused.
 */
MLXSAE_API std::vector<mlx::core::array> topk_encode_masked(const mlx::core::array& x, const mlx::core::array& w_enc,
                                                            const std::optional<mlx::core::array>& b_enc,
                                                            const mlx::core::array& mask, int k, int k_aux,
                                                            const std::optional<Shadow>& shadow = std::nullopt,
                                                            bool tf32 = false, mlx::core::StreamOrDevice s = {});

/** A sparse code in compressed rows (see above). */
struct CsrCode {
  mlx::core::array values;   // [nnz]
  mlx::core::array indices;  // [nnz] uint32, ascending in each row
  mlx::core::array offsets;  // [n + 1] int64
};

/**
 * The k * n largest of all pre-activations of the batch, after relu (BatchTopK). Ties go to the lowest row, then to the
 * lowest feature; only values > 0 (or NaN) are kept. The code has nnz = k * n; where fewer pre-activations are
 * positive, the entries from offsets[n] on are in no row, with value 0 and index 0. Returns the code and the smallest
 * value kept (one float32 number; 0 where nothing is kept; no derivative).
 *
 * `hint`, one number, is a guess of that threshold, such as the last batch's: a good one saves time, no result depends
 * on it. With a `shadow` of w_enc and a good hint the product is screened in 16 bits, with the same bits. Selection,
 * values and derivatives otherwise as in topk_encode. Memory is O(n k).
 */
MLXSAE_API std::pair<CsrCode, mlx::core::array> batch_topk_encode(
    const mlx::core::array& x, const mlx::core::array& w_enc, const std::optional<mlx::core::array>& b_enc, int k,
    const std::optional<mlx::core::array>& hint = std::nullopt, const std::optional<Shadow>& shadow = std::nullopt,
    bool tf32 = false, mlx::core::StreamOrDevice s = {});

/**
 * All pre-activations above a threshold, after relu (JumpReLU): z where z > max(threshold[j], 0). threshold is [d_sae]
 * or one number; where it is NaN, so are the feature's pre-activations, which are then all kept. The code has nnz =
 * capacity >= 0: of more entries the first in order of (row, feature) are kept, and offsets end at capacity. Returns
 * the code and how many entries there are in truth (one int64 number). Entries from offsets[n] on are in no row, with
 * value 0 and index 0. The threshold gets no gradient.
 */
MLXSAE_API std::pair<CsrCode, mlx::core::array> threshold_encode(const mlx::core::array& x,
                                                                 const mlx::core::array& w_enc,
                                                                 const std::optional<mlx::core::array>& b_enc,
                                                                 const mlx::core::array& threshold, int capacity,
                                                                 mlx::core::StreamOrDevice s = {});

/**
 * x_hat[t] = sum_i values[t, i] w_dec[indices[t, i]] + b_dec, [n, d_out].
 *
 * Unused slots are skipped whatever their row holds. An index that is not below d_sae raises std::runtime_error when
 * the array is evaluated (on the CPU).
 */
MLXSAE_API mlx::core::array sparse_decode(const mlx::core::array& values, const mlx::core::array& indices,
                                          const mlx::core::array& w_dec,
                                          const std::optional<mlx::core::array>& b_dec = std::nullopt,
                                          const std::optional<mlx::core::array>& offsets = std::nullopt,
                                          mlx::core::StreamOrDevice s = {});

/**
 * out[t, i] = <rows[t], weight[indices[t, i]]>, [n, k] (or [nnz]): rows weight^T at the code's places only. 0 for
 * entries that are in no row.
 */
MLXSAE_API mlx::core::array gather_dot(const mlx::core::array& rows, const mlx::core::array& weight,
                                       const mlx::core::array& indices,
                                       const std::optional<mlx::core::array>& offsets = std::nullopt,
                                       mlx::core::StreamOrDevice s = {});

/**
 * out[j] = sum over the entries (t, i) with indices[t, i] = j of values[t, i] rows[t], [d_sae, d]: the transposed
 * decode, and the gradient of a decoder. Deterministic: entries are added in ascending order of t, without atomics.
 */
MLXSAE_API mlx::core::array sparse_outer(const mlx::core::array& values, const mlx::core::array& indices,
                                         const mlx::core::array& rows, int d_sae,
                                         const std::optional<mlx::core::array>& offsets = std::nullopt,
                                         mlx::core::StreamOrDevice s = {});

/**
 * Tokens since each feature fired last: 0 where some value > 0 (or NaN) in this batch, else the old count + n_tokens,
 * saturating at 2^31 - 1. tokens_since_fired [d_sae] int32, n_tokens >= 0.
 */
MLXSAE_API mlx::core::array tokens_since_fired(const mlx::core::array& tokens_since_fired,
                                               const mlx::core::array& values, const mlx::core::array& indices,
                                               int n_tokens,
                                               const std::optional<mlx::core::array>& offsets = std::nullopt,
                                               mlx::core::StreamOrDevice s = {});

/**
 * Decode, residual and squared error in one pass: residual = decode(code) - target [n, d_out] and
 * square[t] = |residual[t]|^2 [n], both float32.
 */
MLXSAE_API std::pair<mlx::core::array, mlx::core::array> decode_residual(
    const mlx::core::array& values, const mlx::core::array& indices, const mlx::core::array& w_dec,
    const mlx::core::array& target, const std::optional<mlx::core::array>& b_dec = std::nullopt,
    const std::optional<mlx::core::array>& offsets = std::nullopt, mlx::core::StreamOrDevice s = {});

/** One reconstruction of a loss: the gradient at its output is scale * residual. */
struct UpdateTerm {
  mlx::core::array residual;  // [n, d_out]
  mlx::core::array values;    // [n, k], or [nnz]
  mlx::core::array indices;   // the same
  mlx::core::array scale;     // one number
  std::optional<mlx::core::array> offsets = std::nullopt;
};

/** What becomes of the rows of features without entries in a step. */
enum class Untouched {
  step,          // Adam with gradient 0: dense-exact
  keep_decoder,  // w_dec and its moments stay, until adam_catch_up makes the steps that they have missed
  keep,          // w_enc, b_enc, w_dec and their moments stay for good: row-sparse Adam, which is another optimiser
};

struct UpdateOptions {
  float lr;
  float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f;
  int step = 1;                   // t >= 1 of Adam's bias correction, and the seed of rounding to bfloat16
  bool project_decoder = true;    // remove the part of dw_dec along w_dec
  bool normalize_decoder = true;  // rows of w_dec back to norm 1
  bool b_dec_to_input = false;    // x was taken minus b_dec
  float clip_norm = 0;            // global norm of all gradients, after the projection; 0: no clipping
  Untouched untouched = Untouched::step;
};

/**
 * The backward pass of encode and decode and one Adam step, feature by feature, without gradient buffers.
 *
 * x [n, d_in] is what the encoder saw. terms[0] is the main reconstruction, through which b_dec learns; any others are
 * auxiliary ones (each its own code, no bias). params, m and v are each w_enc [d_sae, d_in],
 * b_enc [d_sae], w_dec [d_sae, d_out], b_dec [d_out], all float32, but for the moments of both matrices, which may be
 * bfloat16: then arithmetic is still in float32, and what is stored is rounded up or down with the probability that
 * makes its mean exact, by a hash of step, matrix, row and column (the same in every run and on every device). Per
 * feature: dz = <g, w_dec>, the gradients of both
 * rows, the projection, Adam with bias correction (every feature, unless `untouched` spares those without entries),
 * the renorm. Where `loss` is not finite nothing changes. Returns params, m, v and the norm of the gradients (NaN where
 * the step was skipped); where the encoder's shadow is given, also its new w16 and columns.
 *
 * The buffers of params, m and v are reused where nobody else holds them; else they are copied. Deterministic; the
 * result does not depend on the number of threads.
 */
MLXSAE_API std::vector<mlx::core::array> feature_update(
    const mlx::core::array& x, const mlx::core::array& loss, const std::vector<UpdateTerm>& terms,
    const std::vector<mlx::core::array>& params, const std::vector<mlx::core::array>& m,
    const std::vector<mlx::core::array>& v, const UpdateOptions& options,
    const std::optional<Shadow>& shadow = std::nullopt, mlx::core::StreamOrDevice s = {});

struct CatchUpOptions {
  std::vector<float> lr;  // learning rates of the last steps, up to that of `step`; NaN: that step was skipped
  float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f;
  int step = 1;           // the last step that has been made, t >= 1 of Adam's bias correction
  bool normalize = true;  // rows back to norm 1 after each step
};

/**
 * The steps that rows of a decoder have missed: Adam without a gradient, bit by bit what feature_update would have done
 * to a feature without entries. w, m and v [d_sae, d] as feature_update's w_dec; last_step [d_sae] int32 is the last
 * step that row j has made, rows [d_sae] bool which rows to bring to `step`. The others keep what they have. No row of
 * these may have missed more steps than there are learning rates. Returns w, m, v and last_step, in the memory of the
 * inputs where nobody else holds them.
 */
MLXSAE_API std::vector<mlx::core::array> adam_catch_up(const mlx::core::array& w, const mlx::core::array& m,
                                                       const mlx::core::array& v, const mlx::core::array& last_step,
                                                       const mlx::core::array& rows, const CatchUpOptions& options,
                                                       mlx::core::StreamOrDevice s = {});

/** The names of all ops. */
MLXSAE_API const std::vector<std::string>& op_names();

/**
 * What runs `op` on a device: "kernel (avx512)" and the like, or "fallback" (plain MLX ops), with the compiler's words
 * where a GPU's kernel did not compile. A kernel that compiles may yet be refused by the GPU when it is first wanted:
 * from then on, that first result included, the op is its fallback.
 */
MLXSAE_API std::string kernel_for(const std::string& op, mlx::core::Device device);

/** Whether MLX's own float32 products are TF32 on this device: on NVIDIA's and M5, unless MLX_ENABLE_TF32=0. */
MLXSAE_API bool products_are_tf32(mlx::core::Device device);

/**
 * What a GPU does for `op`, as JSON: buffers, kernel launches, matrix products (csrc/gpu/plan.h). `sizes` are those
 * that the op's plan names, types "float", "half" or "bfloat"; `gpu` is an architecture such as "applegpu_g14s", of
 * which sizes "chunk_bytes" and "simdgroups" replace the constants. Throws std::invalid_argument for an op without a
 * plan.
 */
MLXSAE_API std::string gpu_plan(const std::string& op,
                                const std::map<std::string, std::variant<int64_t, double, std::string>>& sizes,
                                const std::string& gpu = "");

/**
 * The plan that a GPU would execute for this very result of an op, which must not have been evaluated; its inputs are.
 * Throws std::invalid_argument for any other array.
 */
MLXSAE_API std::string gpu_plan_of(const mlx::core::array& result, const std::string& gpu = "");

/** Whether ops built from now on may use kernels (true at start); otherwise they are graphs of plain MLX ops. */
MLXSAE_API bool kernels_enabled();
MLXSAE_API void enable_kernels(bool enabled);

/** Threads of the CPU kernels; MLXSAE_NUM_THREADS sets the first value. */
MLXSAE_API int num_threads();
MLXSAE_API void set_num_threads(int n);

}  // namespace mlxsae
