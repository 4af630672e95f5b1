#include "sparse_decode.h"

#define INSTANTIATE(T, V) \
  template [[host_name("sparse_decode_" #T "_" #V)]] [[kernel]] decltype(sparse_decode<T, V>) sparse_decode<T, V>;
INSTANTIATE(float, 4)
INSTANTIATE(float, 1)
INSTANTIATE(half, 4)
INSTANTIATE(half, 1)
INSTANTIATE(bfloat, 4)
INSTANTIATE(bfloat, 1)

template [[host_name("decode_residual_4")]] [[kernel]] decltype(decode_residual<4>) decode_residual<4>;
template [[host_name("decode_residual_1")]] [[kernel]] decltype(decode_residual<1>) decode_residual<1>;
