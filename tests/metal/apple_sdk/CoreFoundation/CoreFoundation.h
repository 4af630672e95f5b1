#pragma once
#include <cmath>
#include <cstdint>

typedef double CFTimeInterval;
typedef const void* CFTypeRef;
