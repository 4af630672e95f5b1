#include "adam_catch_up.h"

// M: the type of the moments.
#define INSTANTIATE(M, V)                                                                             \
  template [[host_name("adam_catch_up_" #M "_" #V)]] [[kernel]] decltype(adam_catch_up<V, M>) adam_catch_up<V, M>;
INSTANTIATE(float, 4)
INSTANTIATE(float, 1)
INSTANTIATE(bfloat, 4)
INSTANTIATE(bfloat, 1)
