#include "sparse_outer.h"

#define INSTANTIATE(T, V) \
  template [[host_name("sparse_outer_" #T "_" #V)]] [[kernel]] decltype(sparse_outer<T, V>) sparse_outer<T, V>;
INSTANTIATE(float, 4)
INSTANTIATE(float, 1)
INSTANTIATE(half, 4)
INSTANTIATE(half, 1)
INSTANTIATE(bfloat, 4)
INSTANTIATE(bfloat, 1)
