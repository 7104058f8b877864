#include <tuple>
#include <vector>

#include "common.h"

namespace tsynd {
namespace {

constexpr int64_t kMostDirectClasses = 32;  // beyond, the weights leave L1 and a matrix product wins

struct Job {
  int64_t images, units, padded, classes, samples;
  uint32_t keep;
  int64_t seed, layer;
  const int64_t* ids;
  Objective objective;
  Task task;
  const float* features;  // [images][units]
  const float* weight;    // [classes][padded]
  const float* bias;      // [classes] or null
  float* values;          // [images]
  float* gradient;        // [images][units]
};

void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
               int64_t units) {
  for (int64_t row = 0; row < rows; ++row) {
    std::copy(from + row * from_stride, from + row * from_stride + units, to + row * to_stride);
    if (to_stride > units) std::fill(to + row * to_stride + units, to + (row + 1) * to_stride, 0.f);
  }
}

// Few classes: masks, masked dot products and their transpose in registers, an image at a time.
void run_direct(const Job& job) {
  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, blocks = job.padded / kUnitsPerBlock,
                tiles = (job.images + lanes - 1) / lanes;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Scratch features(lanes * job.padded), gradient(lanes * job.padded);
    const Scratch scratch(dropout_head_scratch(job.samples, job.classes, blocks));
    float values[kMaxLanes];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * lanes, count = std::min(lanes, job.images - first);
      copy_rows(job.features + first * job.units, job.units, features.get(), job.padded, count, job.units);
      k.dropout_head({features.get(), job.weight, job.bias, count, blocks, job.keep, job.seed, job.layer,
                      job.ids + first, job.samples, job.classes, job.objective, job.task, values,
                      gradient.get(), scratch.get()});
      std::copy(values, values + count, job.values + first);
      copy_rows(gradient.get(), job.padded, job.gradient + first * job.units, job.units, count, job.units);
    }
  });
}

// Many classes: per block of images and pass, masked features are packed in cache and multiplied there; the
// second sweep regenerates the same masks from their address.
void run_packed(const Job& job) {
  const Kernels& k = kernels();
  const int64_t rows = 64, blocks = (job.images + rows - 1) / rows, columns = job.samples * job.classes;
  const int64_t mask_blocks = job.padded / kUnitsPerBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch features(rows * job.padded), packed(rows * job.padded), sum(rows * job.padded);
    const Scratch logits(columns * rows), scratch(uncertainty_scratch(job.samples, job.classes)),
        values(rows);
    std::vector<float> bias;
    if (job.bias)
      for (int64_t t = 0; t < job.samples; ++t) bias.insert(bias.end(), job.bias, job.bias + job.classes);
    float* w = const_cast<float*>(job.weight);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * rows, count = std::min(rows, job.images - first);
      const auto at = [&](int64_t row) { return mask_address(job.seed, job.layer, job.ids[first + row]); };
      copy_rows(job.features + first * job.units, job.units, features.get(), job.padded, count, job.units);
      if (count < rows) std::fill(logits.get(), logits.get() + columns * rows, 0.f);
      for (int64_t t = 0; t < job.samples; ++t) {
        for (int64_t row = 0; row < count; ++row)
          k.masked_copy(features.get() + row * job.padded, packed.get() + row * job.padded, mask_blocks,
                        static_cast<uint32_t>(t), job.keep, at(row));
        multiply({logits.get() + t * job.classes * rows, job.classes, count, rows},
                 {w, job.classes, job.padded, job.padded},
                 {packed.get(), count, job.padded, job.padded, true});
      }
      for (int64_t image = 0; image < count; image += k.lanes)
        k.uncertainty({logits.get() + image, rows, job.bias ? bias.data() : nullptr, job.samples, job.classes,
                       job.objective, job.task, values.get() + image, scratch.get()});
      std::copy(values.get(), values.get() + count, job.values + first);
      std::fill(sum.get(), sum.get() + rows * job.padded, 0.f);
      for (int64_t t = 0; t < job.samples; ++t) {
        multiply({packed.get(), count, job.padded, job.padded},
                 {logits.get() + t * job.classes * rows, job.classes, count, rows, true},
                 {w, job.classes, job.padded, job.padded});
        for (int64_t row = 0; row < count; ++row)
          k.masked_add(packed.get() + row * job.padded, sum.get() + row * job.padded, mask_blocks,
                       static_cast<uint32_t>(t), job.keep, at(row));
      }
      copy_rows(sum.get(), job.padded, job.gradient + first * job.units, job.units, count, job.units);
    }
  });
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
  const int64_t images = features_in.size(0), units = features_in.size(1), classes = weight_in.size(0);
  const Tensor features = as_float(features_in), weight = as_float(weight_in);
  const Tensor sample_ids = torch::stable::contiguous(sample_ids_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = as_float(*bias_in);
  Tensor value = new_values(features, images);
  Tensor gradient = torch::stable::empty_like(features);
  if (images > 0) {
    const int64_t padded = (units + kUnitsPerBlock - 1) / kUnitsPerBlock * kUnitsPerBlock;
    const Scratch padded_weight(classes * padded);
    copy_rows(static_cast<const float*>(weight.const_data_ptr()), units, padded_weight.get(), padded, classes,
              units);
    const Job job{images,
                  units,
                  padded,
                  classes,
                  samples,
                  keep,
                  seed,
                  layer,
                  static_cast<const int64_t*>(sample_ids.const_data_ptr()),
                  goal,
                  kind,
                  static_cast<const float*>(features.const_data_ptr()),
                  padded_weight.get(),
                  bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                  static_cast<float*>(value.mutable_data_ptr()),
                  static_cast<float*>(gradient.mutable_data_ptr())};
    if (classes <= kMostDirectClasses)
      run_direct(job);
    else
      run_packed(job);
  }
  const bool narrow_type = features_in.scalar_type() != ScalarType::Float;
  return {value, narrow_type ? torch::stable::to(gradient, features_in.scalar_type()) : gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) {
  m.impl("dropout_head_uncertainty", TORCH_BOX(&dropout_head_uncertainty));
}

}  // namespace tsynd
