#include <algorithm>
#include <tuple>

#include "common.h"
#include "head_mma.cuh"
#include "rows.h"
#include "wgmma_head.h"

namespace tsynd {
namespace {

// Product, rows in place, product; as many images at once as images_at_once allows.
template <class T>
void run_general(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& value, const Tensor& gradient, const RowTask& row) {
  const int64_t images = features.size(0), columns = weight.size(0) * weight.size(1);
  const int64_t at_once = images_at_once(images, columns);
  const Tensor flat = torch::stable::view(weight, {columns, weight.size(2)});
  const Tensor flipped = torch::stable::transpose(flat, 0, 1);
  const Tensor logits = torch::stable::new_empty(features, {at_once, columns}, features.scalar_type());
  const DeviceLimits& limits = device_limits(features);
  for (int64_t first = 0; first < images; first += at_once) {
    const int64_t count = std::min(at_once, images - first);
    const Tensor part = rows_of(logits, 0, count);
    multiply(part, rows_of(features, first, count), flipped);
    const RowLayout layout{count, columns, row.classes, row.classes, row, 0, false};
    run_rows<T>(current_stream(features), read_pointer<T>(part), write_pointer<T>(part),
                read_pointer<T>(bias), write_pointer<float>(value) + first, layout, limits);
    multiply(rows_of(gradient, first, count), part, flat);
  }
}

std::tuple<Tensor, Tensor> head_uncertainty(const Tensor& features_in, const Tensor& weight_in,
                                            const std::optional<Tensor>& bias_in,
                                            const std::string& objective, const std::string& task) {
  const Objective goal = parse_objective(objective);
  const Task kind = parse_task(task);
  check_head(features_in, weight_in, bias_in);
  const torch::stable::accelerator::DeviceGuard guard(features_in.get_device_index());
  const Tensor features = torch::stable::contiguous(features_in),
               weight = torch::stable::contiguous(weight_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  const int64_t images = features.size(0), units = features.size(1), samples = weight.size(0),
                classes = weight.size(1);
  Tensor value = torch::stable::new_empty(features, {images}, ScalarType::Float);
  Tensor gradient = torch::stable::empty_like(features);
  if (images == 0) return {value, gradient};
  const RowTask row = row_task(samples, classes, goal, kind);
  with_dtype(features, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, float>) {
      const auto aligned = [](const Tensor& x) {
        return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
      };
      const HeadPlan plan =
          plan_head(images, units, classes, samples, row.multilabel, true,
                    aligned(features) && aligned(weight), device_limits(features), best_head_kernel());
      const auto run = [&](auto* kernel) {
        kernel(current_stream(features), read_pointer<T>(features), read_pointer<T>(weight),
               read_pointer<T>(bias), write_pointer<T>(gradient), write_pointer<float>(value), images, units,
               row, plan);
      };
      if (plan.kind == HeadPlan::kWgmma) return run(&run_wgmma_head<T>);
      if (plan.kind == HeadPlan::kFused) return run(&run_fused_head<T>);
    }
    run_general<T>(features, weight, bias, value, gradient, row);
  });
  return {value, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CUDA, m) { m.impl("head_uncertainty", TORCH_BOX(&head_uncertainty)); }

}  // namespace tsynd
