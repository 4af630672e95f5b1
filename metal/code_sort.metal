#include "code_sort.h"
