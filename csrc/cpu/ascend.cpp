#include "common.h"

namespace tsynd {
namespace {

void ascend_(Tensor latents, const Tensor& gradient_in, const Tensor& origin_in, double step, double radius,
             const std::string& rule) {
  const bool l2 = check_ascend(latents, gradient_in, origin_in, step, radius, rule);
  const int64_t images = latents.size(0);
  if (images == 0 || latents.numel() == 0) return;
  const Tensor dense = torch::stable::contiguous(latents);
  const Tensor gradient = torch::stable::contiguous(gradient_in),
               origin = torch::stable::contiguous(origin_in);
  const int64_t count = latents.numel() / images;
  const int64_t bytes = count * static_cast<int64_t>(latents.element_size());
  char* z = static_cast<char*>(dense.mutable_data_ptr());
  const char* g = static_cast<const char*>(gradient.const_data_ptr());
  const char* z0 = static_cast<const char*>(origin.const_data_ptr());
  const bool bf16 = latents.scalar_type() == ScalarType::BFloat16;
  const AscentRule kind = l2 ? AscentRule::kL2 : AscentRule::kLinf;
  torch::stable::parallel_for(
      0, images, std::max<int64_t>(1, 16384 / count), [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image)
          kernels().ascend({z + image * bytes, g + image * bytes, z0 + image * bytes, count,
                            static_cast<float>(step), static_cast<float>(radius), kind, bf16});
      });
  if (dense.data_ptr() != latents.data_ptr()) torch::stable::copy_(latents, dense);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) { m.impl("ascend_", TORCH_BOX(&ascend_)); }

}  // namespace tsynd
