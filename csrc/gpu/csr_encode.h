#pragma once

#include "gpu/encode.h"

namespace mlxsae::gpu {

/** Inputs x, w_enc, b_enc, hint[, w16, columns]; outputs values, indices [k n], offsets [n + 1], threshold. The hint is
 * not needed. */
struct BatchTopKEncodeSizes {
  EncodeSizes encode;
  int64_t k;
};
Plan batch_topk_encode(const BatchTopKEncodeSizes& sizes, const Device& device);

/** Inputs x, w_enc, b_enc, bounds [d_sae]; outputs values, indices [capacity], offsets [n + 1], count. */
struct ThresholdEncodeSizes {
  EncodeSizes encode;
  int64_t capacity;
};
Plan threshold_encode(const ThresholdEncodeSizes& sizes, const Device& device);

}  // namespace mlxsae::gpu
