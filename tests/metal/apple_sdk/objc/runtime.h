#pragma once

#define __MAC_26_0 260000

extern "C" {
typedef struct objc_class* Class;
typedef struct objc_object {
  Class isa;
}* id;
typedef struct objc_selector* SEL;
typedef struct objc_object Protocol;
typedef signed char BOOL;
struct objc_method_description {
  SEL name;
  char* types;
};

SEL sel_registerName(const char*);
void* objc_lookUpClass(const char*);
void* objc_getProtocol(const char*);
}
