#define TSYND_ISA avx2
#define TSYND_ISA_NAME "avx2"
#define TSYND_LANES 8
#include "kernels_impl.h"
