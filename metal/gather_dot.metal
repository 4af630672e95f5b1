#include "gather_dot.h"

#define INSTANTIATE(T, V) \
  template [[host_name("gather_dot_" #T "_" #V)]] [[kernel]] decltype(gather_dot<T, V>) gather_dot<T, V>;
INSTANTIATE(float, 4)
INSTANTIATE(float, 1)
INSTANTIATE(half, 4)
INSTANTIATE(half, 1)
INSTANTIATE(bfloat, 4)
INSTANTIATE(bfloat, 1)
