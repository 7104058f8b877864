#include "ascend.cuh"

#include "common.h"

namespace tsynd {
namespace {

void ascend_(Tensor latents, const Tensor& gradient_in, const Tensor& origin_in, double step, double radius,
             const std::string& rule) {
  const bool l2 = check_ascend(latents, gradient_in, origin_in, step, radius, rule);
  const int64_t images = latents.size(0);
  if (images == 0 || latents.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(latents.get_device_index());
  const Tensor dense = torch::stable::contiguous(latents);
  const Tensor gradient = torch::stable::contiguous(gradient_in),
               origin = torch::stable::contiguous(origin_in);
  const AscendStep job{
      images, latents.numel() / images, static_cast<float>(step), static_cast<float>(radius), l2, 0};
  with_dtype(latents, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_ascend<T>(current_stream(latents), write_pointer<T>(dense), read_pointer<T>(gradient),
                  read_pointer<T>(origin), job);
  });
  if (dense.data_ptr() != latents.data_ptr()) torch::stable::copy_(latents, dense);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CUDA, m) { m.impl("ascend_", TORCH_BOX(&ascend_)); }

}  // namespace tsynd
