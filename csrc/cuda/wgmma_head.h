// head_uncertainty by sm_90a's wgmma; defined in wgmma_head.cuh, compiled in wgmma_head.cu.
#pragma once

#include "image_row.cuh"

namespace tsynd {

// The kernel that plan_head names, for a plan of kind kWgmma. `bias` may be null.
template <class T>
void run_wgmma_head(Stream stream, const T* features, const T* weight, const T* bias, T* gradient,
                    float* value, int64_t images, int64_t units, const RowTask& row, const HeadPlan& plan);

}  // namespace tsynd
