#pragma once
#include <objc/runtime.h>

extern "C" {
id objc_msgSend(id, SEL, ...);
void objc_msgSend_stret(id, SEL, ...);
double objc_msgSend_fpret(id, SEL, ...);
}
