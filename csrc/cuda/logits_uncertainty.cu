#include <tuple>

#include "common.h"
#include "rows.cuh"

namespace tsynd {

template void run_rows<float>(Stream, const float*, float*, const float*, float*, RowLayout,
                              const DeviceLimits&);
template void run_rows<Half>(Stream, const Half*, Half*, const Half*, float*, RowLayout, const DeviceLimits&);
template void run_rows<BFloat16>(Stream, const BFloat16*, BFloat16*, const BFloat16*, float*, RowLayout,
                                 const DeviceLimits&);

namespace {

std::tuple<Tensor, Tensor> logits_uncertainty(const Tensor& logits_in, const std::string& objective,
                                              const std::string& task) {
  const Objective goal = parse_objective(objective);
  const Task kind = parse_task(task);
  check_logits(logits_in);
  const torch::stable::accelerator::DeviceGuard guard(logits_in.get_device_index());
  const Tensor logits = torch::stable::contiguous(logits_in);
  const int64_t samples = logits.size(0), images = logits.size(1), classes = logits.size(2);
  Tensor value = torch::stable::new_empty(logits, {images}, ScalarType::Float);
  Tensor gradient = torch::stable::empty_like(logits);
  if (images == 0) return {value, gradient};
  const RowLayout layout{images, classes, images * classes, 0, row_task(samples, classes, goal, kind),
                         0,      false};
  with_dtype(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_rows<T>(current_stream(logits), read_pointer<T>(logits), write_pointer<T>(gradient), nullptr,
                write_pointer<float>(value), layout, device_limits(logits));
  });
  return {value, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CUDA, m) { m.impl("logits_uncertainty", TORCH_BOX(&logits_uncertainty)); }

}  // namespace tsynd
