// Argument checks shared by the operators: one line that names the argument, what came and what is wanted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

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

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& other,
                              const char* other_name) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
      ": its device differs from that of ", other_name, "; wanted the same");
}

inline void check_same_kind(const Tensor& tensor, const char* name, const Tensor& other,
                            const char* other_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, ": its dtype differs from that of ",
                  other_name, "; wanted the same");
  check_same_device(tensor, name, other, other_name);
}

inline void check_dtype(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  const bool narrow = type == ScalarType::BFloat16 || (tensor.is_cuda() && type == ScalarType::Half);
  STD_TORCH_CHECK(type == ScalarType::Float || narrow, name, ": wanted dtype ",
                  tensor.is_cuda() ? "float32, float16 or bfloat16 on CUDA" : "float32 or bfloat16 on CPU");
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
  STD_TORCH_CHECK(samples < int64_t{1} << 31, "samples: got ", samples, ", wanted fewer than 2^31");
}

// What is made of `sizes`, and a few times that, can be counted and addressed.
inline void check_elements(const char* name, std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = int64_t{1} << 46;
  int64_t product = 1;
  std::string text;
  for (const int64_t size : sizes) {
    text += (text.empty() ? "" : " x ") + std::to_string(size);
    product = size > 0 && product > kMost / size ? kMost + 1 : product * size;
  }
  STD_TORCH_CHECK(product <= kMost, name, ": got ", text, " values, wanted at most 2^46");
}

inline void check_sizes(int64_t classes, int64_t units) {
  STD_TORCH_CHECK(classes >= 1, "classes: got ", classes, ", wanted at least 1");
  STD_TORCH_CHECK(units >= 1, "units: got ", units, ", wanted at least 1");
}

inline void check_layer(int64_t layer) {
  STD_TORCH_CHECK(layer >= 0 && layer <= 0xFFFFFFFFll, "layer: got ", layer, ", wanted 0 .. 2^32 - 1");
}

// The arguments of each operator.

inline void check_logits(const Tensor& logits) {
  check_rank(logits, "logits", 3, "[samples, images, classes]");
  check_dtype(logits, "logits");
  check_samples(logits.size(0));
  check_sizes(logits.size(2), 1);
}

inline void check_targets(const Tensor& logits, const Tensor& targets) {
  check_logits(logits);
  check_rank(targets, "targets", 3, "[samples, targets, classes]");
  check_same_kind(targets, "targets", logits, "logits");
  STD_TORCH_CHECK(targets.size(0) == logits.size(0) && targets.size(2) == logits.size(2),
                  "targets: got shape ", shape_of(targets), ", wanted [", logits.size(0), ", targets, ",
                  logits.size(2), "] as logits ", shape_of(logits));
  STD_TORCH_CHECK(targets.size(1) >= 1, "targets: got none, wanted at least one");
}

inline void check_head(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_rank(features, "features", 2, "[images, units]");
  check_rank(weight, "weight", 3, "[samples, classes, units]");
  check_dtype(features, "features");
  check_same_kind(weight, "weight", features, "features");
  const int64_t units = features.size(1), samples = weight.size(0), classes = weight.size(1);
  STD_TORCH_CHECK(weight.size(2) == units, "weight: got shape ", shape_of(weight),
                  ", wanted its last size to be ", units, " as in features ", shape_of(features));
  check_samples(samples);
  check_sizes(classes, units);
  if (!bias) return;
  check_same_kind(*bias, "bias", features, "features");
  STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == samples && bias->size(1) == classes,
                  "bias: got shape ", shape_of(*bias), ", wanted [", samples, ", ", classes, "]");
}

inline void check_dropout_head(const Tensor& features, const Tensor& weight,
                               const std::optional<Tensor>& bias, int64_t samples, int64_t layer,
                               const Tensor& sample_ids) {
  check_rank(features, "features", 2, "[images, units]");
  check_rank(weight, "weight", 2, "[classes, units]");
  check_dtype(features, "features");
  check_same_kind(weight, "weight", features, "features");
  const int64_t units = features.size(1), classes = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == units, "weight: got shape ", shape_of(weight),
                  ", wanted its last size to be ", units, " as in features ", shape_of(features));
  check_samples(samples);
  check_sizes(classes, units);
  check_elements("samples", {samples, classes, units});
  check_elements("samples", {samples, features.size(0), classes});
  check_layer(layer);
  check_sample_ids(sample_ids, features.size(0));
  check_same_device(sample_ids, "sample_ids", features, "features");
  if (!bias) return;
  check_same_kind(*bias, "bias", features, "features");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == classes, "bias: got shape ", shape_of(*bias),
                  ", wanted [", classes, "]");
}

inline void check_mask(int64_t units, int64_t samples, int64_t layer, const Tensor& sample_ids) {
  check_samples(samples);
  check_layer(layer);
  check_sample_ids(sample_ids, -1);
  STD_TORCH_CHECK(units >= 0, "units: got ", units, ", wanted at least 0");
  check_elements("mask", {samples, sample_ids.size(0), units});
}

// `input` [images or samples * images, units, inner]; returns the number of images.
inline int64_t check_expand(const Tensor& input, const char* name, int64_t samples, int64_t layer,
                            const Tensor& sample_ids, bool passes) {
  check_rank(input, name, 3, "[images, units, values per unit]");
  check_dtype(input, name);
  check_samples(samples);
  check_layer(layer);
  STD_TORCH_CHECK(!passes || input.size(0) % samples == 0, name, ": got shape ", shape_of(input),
                  ", wanted its first size to be a multiple of samples ", samples);
  const int64_t images = passes ? input.size(0) / samples : input.size(0);
  check_sample_ids(sample_ids, sample_ids.dim() == 1 && sample_ids.size(0) == 1 ? 1 : images);
  check_same_device(sample_ids, "sample_ids", input, name);
  check_elements("samples", {samples, images, input.size(1), input.size(2)});
  return images;
}

// Whether rule l2 (else linf) is asked for.
inline bool check_ascend(const Tensor& latents, const Tensor& gradient, const Tensor& origin, double step,
                         double radius, const std::string& rule) {
  STD_TORCH_CHECK(rule == "l2" || rule == "linf", "rule: got '", rule, "', wanted 'l2' or 'linf'");
  STD_TORCH_CHECK(std::isfinite(step), "step: got ", step, ", wanted a finite number");
  STD_TORCH_CHECK(radius >= 0., "radius: got ", radius, ", wanted at least 0");
  STD_TORCH_CHECK(latents.dim() >= 1, "latents: got a scalar, wanted [images, ...]");
  check_dtype(latents, "latents");
  for (const auto& [tensor, name] : {std::pair(&gradient, "gradient"), std::pair(&origin, "origin")}) {
    check_same_kind(*tensor, name, latents, "latents");
    STD_TORCH_CHECK(shape_of(*tensor) == shape_of(latents), name, ": got shape ", shape_of(*tensor),
                    ", wanted ", shape_of(latents), " as latents");
  }
  return rule == "l2";
}

}  // namespace tsynd
