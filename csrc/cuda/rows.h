// From logits in memory to value and logit gradient; defined in rows.cuh, compiled in logits_uncertainty.cu.
#pragma once

#include "image_row.cuh"

namespace tsynd {

// Where the logits of image b, pass t and class c are: b * image_stride + t * pass_stride + c.
struct RowLayout {
  int64_t images, image_stride, pass_stride;
  int64_t bias_stride;  // of passes in the bias, 0 where all passes share it
  RowTask row;
  int lanes;    // register_rows: lanes of a warp that share an image, a power of two
  bool vector;  // register_rows: kClasses logits may be read and written as whole vectors
};

// Value and gradient of all images by the kernel that plan_rows names. `gradient` may be `logits`; `bias` may
// be null.
template <class T>
void run_rows(Stream stream, const T* logits, T* gradient, const T* bias, float* value, RowLayout layout,
              const DeviceLimits& limits);

}  // namespace tsynd
