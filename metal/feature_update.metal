#include "feature_update.h"

#define INSTANTIATE(V)                                                                                           \
  template [[host_name("feature_update_simdgroup_" #V)]] [[kernel]] decltype(feature_update<V, false>)           \
      feature_update<V, false>;                                                                                  \
  template [[host_name("feature_update_threadgroup_" #V)]] [[kernel]] decltype(feature_update<V, true>)          \
      feature_update<V, true>;                                                                                   \
  template [[host_name("feature_update_wide_" #V)]] [[kernel]] decltype(feature_update_wide<V>)                  \
      feature_update_wide<V>;                                                                                    \
  template [[host_name("residual_sums_" #V)]] [[kernel]] decltype(residual_sums<V>) residual_sums<V>;            \
  template [[host_name("bias_gradient_" #V)]] [[kernel]] decltype(bias_gradient<V>) bias_gradient<V>;
INSTANTIATE(4)
INSTANTIATE(1)
