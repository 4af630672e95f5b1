#include "topk_encode.h"

#define instantiate(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// P: the product's type, T: that of the operands whose float32 results are wanted. V: 4 where rows are whole vectors.
#define instantiate_filter(P, V)                                                \
  instantiate("topk_filter_" #P "_" #V, topk_filter<P, V>)                      \
  instantiate("topk_filter_aux_" #P "_" #V, topk_filter_aux<P, V>)

#define instantiate_exact(P, T, V)                                                               \
  instantiate("topk_filter_exact_" #P "_" #T "_" #V, topk_filter_exact<P, T, V>)                 \
  instantiate("topk_filter_exact_aux_" #P "_" #T "_" #V, topk_filter_exact_aux<P, T, V>)

#define instantiate_type(T)                                                      \
  instantiate_filter(T, 4)                                                       \
  instantiate_filter(T, 1)                                                       \
  instantiate_exact(T, T, 4)                                                     \
  instantiate_exact(T, T, 1)                                                     \
  instantiate("topk_finish_" #T, topk_finish<T, T, 1, false>)                    \
  instantiate("topk_finish_exact_" #T "_4", topk_finish<T, T, 4, true>)          \
  instantiate("topk_finish_exact_" #T "_1", topk_finish<T, T, 1, true>)

instantiate_type(float)
instantiate_type(half)
instantiate_type(bfloat)
instantiate_exact(bfloat, float, 4)  // with the encoder's shadow
instantiate_exact(bfloat, float, 1)
