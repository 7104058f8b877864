#include <algorithm>
#include <tuple>

#include "common.h"
#include "dropout_head.cuh"
#include "dropout_mask.cuh"
#include "rows.h"

namespace tsynd {
namespace {

constexpr int64_t kMostExpanded = int64_t{1} << 26;  // masked features in memory at once, elements

// For shapes that the kernels with masks in registers do not take: a few passes at a time, masked features
// are written and multiplied; the second sweep makes the same masks again for the products' transpose. The
// logits of all passes are in memory between the sweeps.
template <class T>
void run_general(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& sample_ids, const Tensor& value, const Tensor& gradient,
                 const DropoutHead& job) {
  const int64_t images = job.images, units = job.units, samples = job.row.samples, classes = job.row.classes;
  const int64_t at_once = std::clamp<int64_t>(kMostExpanded / (images * units), 1, samples);
  const cudaStream_t stream = current_stream(features);
  const Tensor masked = torch::stable::new_empty(features, {at_once * images, units}, features.scalar_type());
  const Tensor logits =
      torch::stable::new_empty(features, {samples * images, classes}, features.scalar_type());
  const Tensor sum = torch::stable::new_zeros(features, {images, units}, ScalarType::Float);
  const Tensor flipped = torch::stable::transpose(weight, 0, 1);
  const auto each_part = [&](const auto& work) {
    for (int64_t t = 0; t < samples; t += at_once) {
      const int64_t passes = std::min(at_once, samples - t);
      const Expansion part{images, units,      1,        static_cast<int>(t), static_cast<int>(passes), false,
                           false,  job.stream, job.scale};
      work(part, rows_of(logits, t * images, passes * images), rows_of(masked, 0, passes * images));
    }
  };
  each_part([&](const Expansion& part, const Tensor& own_logits, const Tensor& own_masked) {
    run_expand<T>(stream, read_pointer<T>(features), write_pointer<T>(own_masked),
                  read_pointer<int64_t>(sample_ids), part);
    multiply(own_logits, own_masked, flipped);
  });
  const RowLayout layout{images, classes, images * classes, 0, job.row, 0, false};
  run_rows<T>(stream, read_pointer<T>(logits), write_pointer<T>(logits), read_pointer<T>(bias),
              write_pointer<float>(value), layout, device_limits(features));
  each_part([&](const Expansion& part, const Tensor& own_logits, const Tensor& own_masked) {
    multiply(own_masked, own_logits, weight);
    run_gather<T, float, true>(stream, read_pointer<T>(own_masked), write_pointer<float>(sum),
                               read_pointer<int64_t>(sample_ids), part);
  });
  Tensor out = gradient;
  torch::stable::copy_(out, sum);
}

std::tuple<Tensor, Tensor> dropout_head_uncertainty(const Tensor& features_in, const Tensor& weight_in,
                                                    const std::optional<Tensor>& bias_in, double p,
                                                    int64_t samples, int64_t seed, int64_t layer,
                                                    const Tensor& sample_ids_in, const std::string& objective,
                                                    const std::string& task) {
  const Objective goal = parse_objective(objective);
  const Task kind = parse_task(task);
  check_dropout_head(features_in, weight_in, bias_in, samples, layer, sample_ids_in);
  const uint32_t keep = keep_count(p);
  const torch::stable::accelerator::DeviceGuard guard(features_in.get_device_index());
  const Tensor features = torch::stable::contiguous(features_in),
               weight = torch::stable::contiguous(weight_in);
  const Tensor sample_ids = torch::stable::contiguous(sample_ids_in);
  const std::optional<Tensor> bias = contiguous(bias_in);
  const int64_t images = features.size(0), units = features.size(1), classes = weight.size(0);
  STD_TORCH_CHECK(units < int64_t{1} << 31, "features: got ", units, " units, wanted fewer than 2^31");
  Tensor value = torch::stable::new_empty(features, {images}, ScalarType::Float);
  Tensor gradient = torch::stable::empty_like(features);
  if (images == 0) return {value, gradient};
  const MaskAddress at = mask_address(seed, layer, 0);
  const DropoutHead job{images,
                        static_cast<int>(units),
                        0,
                        row_task(samples, classes, goal, kind),
                        {at.key0, at.key1, at.layer, keep_test(keep)},
                        256.f / static_cast<float>(keep),
                        0};
  with_dtype(features, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const DropoutHeadPlan plan =
        plan_dropout_head(units, classes, samples, !std::is_same_v<T, float>, device_limits(features));
    if (plan.kind == DropoutHeadPlan::kGeneral) {
      const int64_t at_once = images_at_once(images, samples * classes);
      for (int64_t first = 0; first < images; first += at_once) {
        DropoutHead part = job;
        part.images = std::min(at_once, images - first);
        const auto of = [&](const Tensor& x) { return rows_of(x, first, part.images); };
        run_general<T>(of(features), weight, bias, of(sample_ids), of(value), of(gradient), part);
      }
    } else {
      run_dropout_head<T>(current_stream(features), read_pointer<T>(features), read_pointer<T>(weight),
                          read_pointer<T>(bias), read_pointer<int64_t>(sample_ids),
                          write_pointer<T>(gradient), write_pointer<float>(value), job, plan);
    }
  });
  return {value, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CUDA, m) {
  m.impl("dropout_head_uncertainty", TORCH_BOX(&dropout_head_uncertainty));
}

}  // namespace tsynd
