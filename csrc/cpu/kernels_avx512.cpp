#define TSYND_ISA avx512
#define TSYND_ISA_NAME "avx512"
#define TSYND_LANES 16
#include "kernels_impl.h"
