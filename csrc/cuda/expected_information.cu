#include "expected_information.cuh"

#include <algorithm>
#include <tuple>

#include "common.h"

namespace tsynd {
namespace {

Tensor floats(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

// [rows, columns] of a matrix, not copied.
Tensor block_of(const Tensor& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Tensor part = rows_of(matrix, row, rows);
  return torch::stable::narrow(part, 1, column, columns);
}

// As csrc/cpu/expected_information.cpp; intermediates are float32 whatever the logits are.
template <class T>
void run(const Tensor& logits, const Tensor& targets, const Tensor& value, const Tensor& gradient,
         bool multilabel) {
  const cudaStream_t stream = current_stream(logits);
  const int64_t samples = logits.size(0), images = logits.size(1), classes = logits.size(2),
                count = targets.size(1), groups = multilabel ? classes : 1,
                outcomes = multilabel ? 2 : classes, columns = count * outcomes;
  const InformationPlan plan =
      plan_information(images, count, classes, samples, multilabel, device_limits(logits));
  const Ratios of_targets{count, count * classes, static_cast<int>(samples), static_cast<int>(classes),
                          multilabel};
  const Tensor theirs = floats(logits, groups * samples, columns),
               weighted = floats(logits, groups * samples, columns),
               their_mean = floats(logits, groups, columns);
  run_sample_ratios<T>(stream, read_pointer<T>(targets), write_pointer<float>(theirs), nullptr,
                       write_pointer<float>(their_mean), of_targets, plan.shared_bytes);
  run_weigh_ratios(stream, read_pointer<float>(theirs), read_pointer<float>(their_mean),
                   write_pointer<float>(weighted), groups * samples, samples, columns);
  const float inverse = 1.f / static_cast<float>(samples);
  for (int64_t first = 0; first < images; first += plan.images) {
    const int64_t here = std::min(plan.images, images - first), rows = here * outcomes;
    const Tensor own = floats(logits, groups * samples, rows), p = floats(logits, groups * samples, rows),
                 mean = floats(logits, groups, rows), slope = floats(logits, groups * samples, rows),
                 joint = floats(logits, rows, plan.columns);
    const Tensor sums = torch::stable::new_zeros(logits, {2 * groups, rows}, ScalarType::Float);
    run_sample_ratios<T>(
        stream, read_pointer<T>(logits) + first * classes, write_pointer<float>(own), write_pointer<float>(p),
        write_pointer<float>(mean),
        {here, images * classes, static_cast<int>(samples), static_cast<int>(classes), multilabel},
        plan.shared_bytes);
    float* const excess = write_pointer<float>(sums);
    float* const gained = excess + groups * rows;
    for (int64_t g = 0; g < groups; ++g) {
      const Tensor own_group = rows_of(own, g * samples, samples), to = rows_of(slope, g * samples, samples);
      for (int64_t at = 0; at < columns; at += plan.columns) {
        const int64_t some = std::min(plan.columns, columns - at);
        const Tensor part = some == plan.columns ? joint : floats(logits, rows, some);
        multiply(part, torch::stable::transpose(own_group, 0, 1),
                 block_of(theirs, g * samples, samples, at, some));
        run_joint_logs(stream, write_pointer<float>(part), read_pointer<float>(their_mean) + g * columns + at,
                       excess + g * rows, gained + g * rows, rows, some, inverse);
        const Tensor weights = block_of(weighted, g * samples, samples, at, some),
                     logs = torch::stable::transpose(part, 0, 1);
        const Tensor sum = at == 0 ? to : floats(logits, samples, rows);
        multiply(sum, weights, logs);
        if (at > 0) run_add_to(stream, write_pointer<float>(to), read_pointer<float>(sum), samples * rows);
      }
    }
    run_information_gradient<T>(
        stream, read_pointer<float>(slope), read_pointer<float>(p), read_pointer<float>(mean), excess, gained,
        write_pointer<T>(gradient) + first * classes, write_pointer<float>(value) + first,
        {here, images * classes, static_cast<int>(samples), static_cast<int>(classes), 0, multilabel,
         1.f / static_cast<float>(count)});
  }
}

std::tuple<Tensor, Tensor> expected_information(const Tensor& logits_in, const Tensor& targets_in,
                                                const std::string& task) {
  const Task kind = parse_task(task);
  check_targets(logits_in, targets_in);
  row_task(logits_in.size(0), logits_in.size(2), Objective::kMutualInformation, kind);  // their sizes
  const torch::stable::accelerator::DeviceGuard guard(logits_in.get_device_index());
  const Tensor logits = torch::stable::contiguous(logits_in), targets = torch::stable::contiguous(targets_in);
  Tensor value = torch::stable::new_empty(logits, {logits.size(1)}, ScalarType::Float);
  Tensor gradient = torch::stable::empty_like(logits);
  if (logits.size(1) == 0) return {value, gradient};
  with_dtype(logits, [&](auto* type) {
    run<std::remove_pointer_t<decltype(type)>>(logits, targets, value, gradient, kind == Task::kMultilabel);
  });
  return {value, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CUDA, m) {
  m.impl("expected_information", TORCH_BOX(&expected_information));
}

}  // namespace tsynd
