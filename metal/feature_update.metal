#include "feature_update.h"

// M: the type of the matrices' moments.
#define INSTANTIATE_WALK(M, V)                                                                                     \
  template [[host_name("feature_update_simdgroup_" #M "_" #V)]] [[kernel]] decltype(feature_update<V, false, M>)   \
      feature_update<V, false, M>;                                                                                 \
  template [[host_name("feature_update_threadgroup_" #M "_" #V)]] [[kernel]] decltype(feature_update<V, true, M>)  \
      feature_update<V, true, M>;                                                                                  \
  template [[host_name("feature_update_wide_" #M "_" #V)]] [[kernel]] decltype(feature_update_wide<V, M>)          \
      feature_update_wide<V, M>;                                                                                   \
  template [[host_name("update_spared_" #M "_" #V)]] [[kernel]] decltype(update_spared<V, M>) update_spared<V, M>;
#define INSTANTIATE(V)                                                                                             \
  INSTANTIATE_WALK(float, V)                                                                                       \
  INSTANTIATE_WALK(bfloat, V)                                                                                      \
  template [[host_name("residual_sums_" #V)]] [[kernel]] decltype(residual_sums<V>) residual_sums<V>;              \
  template [[host_name("bias_gradient_" #V)]] [[kernel]] decltype(bias_gradient<V>) bias_gradient<V>;
INSTANTIATE(4)
INSTANTIATE(1)
