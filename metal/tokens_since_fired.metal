#include "tokens_since_fired.h"
