#include "wgmma_head.cuh"

namespace tsynd {

template void run_wgmma_head<Half>(Stream, const Half*, const Half*, const Half*, Half*, float*, int64_t,
                                   int64_t, const RowTask&, const HeadPlan&);
template void run_wgmma_head<BFloat16>(Stream, const BFloat16*, const BFloat16*, const BFloat16*, BFloat16*,
                                       float*, int64_t, int64_t, const RowTask&, const HeadPlan&);

}  // namespace tsynd
