#define TSYND_ISA generic
#define TSYND_ISA_NAME "generic"
#define TSYND_LANES 4
#include "kernels_impl.h"
