#pragma once

#include "gpu/encode.h"

namespace mlxsae::gpu {

/** topk_encode; with k_aux > 0 also a second selection among masked features. */
struct TopKEncodeSizes {
  EncodeSizes encode;
  int64_t k, k_aux;
};

/** Inputs x, w_enc, b_enc[, mask][, w16, columns]; outputs values, indices[, values and indices of the masked]. */
Plan topk_encode(const TopKEncodeSizes& sizes, const Device& device);

}  // namespace mlxsae::gpu
