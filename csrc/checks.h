// Argument checks shared by the operators: one line that names the argument, what came and what is wanted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <string>

#include "uncertainty.h"

namespace tsynd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline Objective parse_objective(const std::string& objective) {
  if (objective == "mutual_information") return Objective::kMutualInformation;
  STD_TORCH_CHECK(objective == "entropy", "objective: got '", objective,
                  "', wanted 'mutual_information' or 'entropy'");
  return Objective::kEntropy;
}

inline Task parse_task(const std::string& task) {
  if (task == "multiclass") return Task::kMulticlass;
  STD_TORCH_CHECK(task == "multilabel", "task: got '", task, "', wanted 'multiclass' or 'multilabel'");
  return Task::kMultilabel;
}

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank, const char* layout) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, ": got shape ", shape_of(tensor), ", wanted ", layout);
}

inline void check_same_kind(const Tensor& tensor, const char* name, const Tensor& other,
                            const char* other_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, ": its dtype differs from that of ",
                  other_name, "; wanted the same");
  STD_TORCH_CHECK(
      tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
      ": its device differs from that of ", other_name, "; wanted the same");
}

inline void check_cpu_dtype(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  ": wanted dtype float32 or bfloat16 on CPU");
}

inline void check_sample_ids(const Tensor& ids, int64_t images) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "sample_ids: wanted dtype int64");
  STD_TORCH_CHECK(ids.dim() == 1 && (images < 0 || ids.size(0) == images), "sample_ids: got shape ",
                  shape_of(ids), ", wanted one id per image");
}

// Of 256 byte values, how many keep a unit: 1 - p rounded to 1/256. An active dropout never rounds to none
// and never to all, so that a small p still gives posterior samples that differ.
inline uint32_t keep_count(double p) {
  STD_TORCH_CHECK(p >= 0. && p < 1., "p: got ", p, ", wanted a drop probability in [0, 1)");
  if (p == 0.) return 256;
  const double keep = std::nearbyint((1. - p) * 256.);
  return static_cast<uint32_t>(keep < 1. ? 1. : keep > 255. ? 255. : keep);
}

inline void check_samples(int64_t samples) {
  STD_TORCH_CHECK(samples >= 1, "samples: got ", samples, ", wanted at least 1");
}

inline void check_sizes(int64_t classes, int64_t units) {
  STD_TORCH_CHECK(classes >= 1, "classes: got ", classes, ", wanted at least 1");
  STD_TORCH_CHECK(units >= 1, "units: got ", units, ", wanted at least 1");
}

inline void check_layer(int64_t layer) {
  STD_TORCH_CHECK(layer >= 0 && layer <= 0xFFFFFFFFll, "layer: got ", layer, ", wanted 0 .. 2^32 - 1");
}

}  // namespace tsynd
