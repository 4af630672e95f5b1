#include "csr_encode.h"

#define instantiate(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define instantiate_lanes(P, V)                                                        \
  instantiate("csr_filter_batch_" #P "_" #V, csr_filter_batch<P, V>)                   \
  instantiate("csr_filter_threshold_" #P "_" #V, csr_filter_threshold<P, V>)           \
  instantiate("csr_filter_batch_exact_" #P "_" #V, csr_filter_batch_exact<P, V>)       \
  instantiate("csr_filter_threshold_exact_" #P "_" #V, csr_filter_threshold_exact<P, V>) \
  instantiate("csr_settle_batch_" #P "_" #V, csr_settle_batch<P, V>)                   \
  instantiate("csr_settle_threshold_" #P "_" #V, csr_settle_threshold<P, V>)

#define instantiate_type(P)                    \
  instantiate_lanes(P, 4)                      \
  instantiate_lanes(P, 1)                      \
  instantiate("csr_write_" #P, csr_write<P>)

instantiate_type(float)
instantiate_type(half)
instantiate_type(bfloat)
