#include "common.h"

namespace tsynd {
namespace {

// mask [T, N, units] (bool): addressed by (seed, layer, pass, sample id, unit) alone.
Tensor dropout_mask(int64_t units, double p, int64_t samples, int64_t seed, int64_t layer,
                    const Tensor& sample_ids_in) {
  const uint32_t keep = keep_count(p);
  check_mask(units, samples, layer, sample_ids_in);
  const Tensor sample_ids = torch::stable::contiguous(sample_ids_in);
  const int64_t images = sample_ids.size(0);
  const int64_t* ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  Tensor mask = torch::stable::new_empty(sample_ids, {samples, images, units}, ScalarType::Bool);
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, units));
  torch::stable::parallel_for(0, samples * images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels().mask_bytes(out + row * units, units, static_cast<uint32_t>(row / images), keep,
                           mask_address(seed, layer, ids[row % images]));
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace tsynd
