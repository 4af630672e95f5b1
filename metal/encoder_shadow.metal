#include "encoder_shadow.h"

template [[host_name("encoder_shadow_4")]] [[kernel]] decltype(encoder_shadow<4>) encoder_shadow<4>;
template [[host_name("encoder_shadow_1")]] [[kernel]] decltype(encoder_shadow<1>) encoder_shadow<1>;
