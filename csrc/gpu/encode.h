#pragma once
// What the plans of the encoders share: a product of x and w_enc over chunks of features, and what bounds its error.

#include "gpu/device.h"
#include "gpu/plan.h"

namespace mlxsae::gpu {

/** Up to so many rows are multiplied by our own kernel, for which reading the weights once is the floor. */
constexpr int64_t kFewRows = 8;
/** A row's features are looked at in up to so many parts, each of at least so many. */
constexpr int64_t kMaxParts = 32, kPartFeatures = 1024;

/** x [n, d_in], w_enc [d_sae, d_in] of one type, b_enc [d_sae] float32. */
struct EncodeSizes {
  int64_t n, d_in, d_sae;
  Type type;
  bool exact;         // the float32 result (ops ask for it where type is f32); else that of the product in `type`.
                      // With few rows it is exact in any case
  bool shadow;        // multiply in bfloat16: w16 and columns are inputs
  bool aligned;       // rows of x and w_enc are whole vectors
  bool aligned_bias;  // so are b_enc and, with a shadow, columns
};

/** Buffers of an encoder's inputs, in the order of the primitive's. */
struct EncodeInputs {
  int x, w, bias, w16 = -1, columns = -1;
};

/** The product chunk after chunk. */
class Products {
 public:
  Products(Plan& plan, const EncodeSizes& sizes, const EncodeInputs& in, const Device& device);

  Type type() const { return type_; }
  bool screened() const { return screened_; }  // results are intervals around the product
  int64_t chunk() const { return chunk_; }     // features of all chunks but perhaps the last
  int64_t chunks() const { return few_ || sizes_.d_sae == 0 ? 1 : ceil_div(sizes_.d_sae, chunk_); }
  int64_t first(int64_t c) const { return c * chunk_; }
  int64_t width(int64_t c) const { return std::min(chunk_, sizes_.d_sae - first(c)); }
  /** 4 where the rows of chunk c are whole vectors, else 1: the V of the kernels that read it. */
  int lanes(int64_t c) const { return width(c) % 4 == 0 && sizes_.aligned_bias ? 4 : 1; }

  /** What comes before all chunks. */
  void begin();
  /** The steps that make chunk c of the product [n, width(c)], in buffer(). */
  void make(int64_t c);
  int buffer() const { return product_; }

  // Where results are screened: rows [2, n], columns [3, d_sae], edge [chunks, 4].
  int rows() const { return rows_; }
  int columns() const { return columns_; }
  int edge() const { return edge_; }
  /** Rounding of the product's own type, relative and absolute, and what vanishing squares may hide from a norm. */
  float cut() const { return type_ == Type::bf16 ? 0x1p-8f : type_ == Type::f16 ? 0x1p-10f : 0.0f; }
  float least() const { return type_ == Type::f16 ? 1e-7f : type_ == Type::bf16 ? 1e-38f : 0.0f; }
  float tiny() const { return 1.1e-19f * static_cast<float>(sizes_.d_in); }

 private:
  std::string vectors() const { return sizes_.aligned ? "_4" : "_1"; }

  Plan& plan_;
  EncodeSizes sizes_;
  EncodeInputs in_;
  bool few_, screened_;
  Type type_;
  int64_t chunk_;
  float input_cut_;  // what the framework's product may round off its inputs
  int product_, x16_ = -1, rows_ = -1, columns_ = -1, edge_ = -1;
};

}  // namespace mlxsae::gpu
