#include "encode_products.h"

#define instantiate(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

#define instantiate_type(type)                                                  \
  instantiate("encode_rows_" #type "_4", encode_rows<type, 4>)           \
  instantiate("encode_rows_" #type "_1", encode_rows<type, 1>)           \
  instantiate("encode_columns_" #type "_4", encode_columns<type, 4>)            \
  instantiate("encode_columns_" #type "_1", encode_columns<type, 1>)            \
  instantiate("encode_chain_" #type "_4_n1", encode_chain<type, 4, 1>)          \
  instantiate("encode_chain_" #type "_4_n2", encode_chain<type, 4, 2>)          \
  instantiate("encode_chain_" #type "_4_n4", encode_chain<type, 4, 4>)          \
  instantiate("encode_chain_" #type "_4_n8", encode_chain<type, 4, 8>)          \
  instantiate("encode_chain_" #type "_1_n8", encode_chain<type, 1, 8>)

instantiate_type(float)
instantiate_type(half)
instantiate_type(bfloat)
instantiate("encode_round_4", encode_round<4>)
instantiate("encode_round_1", encode_round<1>)
