#include <tuple>

#include "common.h"

namespace tsynd {
namespace {

constexpr int64_t kRowsPerThread = 64;  // fewer make thin products

// Whole vectors of images.
int64_t padded_rows(int64_t images) { return (images + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// Rows of images worked on at once. The logits block [T * C, rows] should stay in a core's L2 between the two
// products, and the weights, streamed once per block, should be reused by enough rows when they are large.
int64_t block_rows(int64_t images, int64_t columns, int64_t units, int64_t threads) {
  const int64_t kLogitsInCache = 96 * 1024, kWeightsInCache = 256 * 1024;  // floats
  int64_t rows = std::max<int64_t>(64, kLogitsInCache / columns);
  if (columns * units > kWeightsInCache) rows = std::max<int64_t>(rows, 256);
  // as many blocks for every thread
  const int64_t blocks = (images + rows * threads - 1) / (rows * threads) * threads;
  rows = (images + blocks - 1) / blocks;
  return padded_rows(rows);
}

// logits^T [T * C, rows] = W F^T, then one sweep for value and logit gradient with an image per lane, then
// dF = dlogits W.
std::tuple<Tensor, Tensor> head_uncertainty(const Tensor& features_in, const Tensor& weight_in,
                                            const std::optional<Tensor>& bias_in,
                                            const std::string& objective, const std::string& task) {
  const Objective goal = parse_objective(objective);
  const Task kind = parse_task(task);
  check_head(features_in, weight_in, bias_in);
  const int64_t images = features_in.size(0), units = features_in.size(1);
  const int64_t samples = weight_in.size(0), classes = weight_in.size(1), columns = samples * classes;
  const bool narrow_type = features_in.scalar_type() != ScalarType::Float;
  const Tensor features = as_float(features_in), weight = as_float(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = as_float(*bias_in);
  Tensor value = new_values(features, images);
  Tensor gradient = torch::stable::empty_like(features);

  const Kernels& k = kernels();
  float* f = static_cast<float*>(features.mutable_data_ptr());
  float* w = static_cast<float*>(weight.mutable_data_ptr());
  float* df = static_cast<float*>(gradient.mutable_data_ptr());
  float* values = static_cast<float*>(value.mutable_data_ptr());
  const float* b = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  const Matrix weights{w, columns, units, units};

  const auto sweep = [&](float* logits, int64_t stride, int64_t begin, int64_t end, float* out,
                         float* scratch) {
    for (int64_t image = begin; image < end; image += k.lanes)
      k.uncertainty(
          {logits + image, stride, b, samples, classes, goal, kind, out + (image - begin), scratch});
  };
  const int64_t threads = torch::stable::get_num_threads(), padded = padded_rows(images);
  if (images > 0 && padded < kRowsPerThread * threads) {
    // Few images: each thread's share would make a thin product, so the products are shared out by torch.
    const Scratch logits(columns * padded), out(padded);
    if (padded != images) std::fill(logits.get(), logits.get() + columns * padded, 0.f);
    const Matrix rows{logits.get(), columns, images, padded};
    multiply(rows, weights, {f, images, units, units, true});
    torch::stable::parallel_for(0, padded / kMaxLanes, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(uncertainty_scratch(samples, classes));
      sweep(logits.get(), padded, begin * kMaxLanes, end * kMaxLanes, out.get() + begin * kMaxLanes,
            scratch.get());
    });
    std::copy(out.get(), out.get() + images, values);
    multiply({df, images, units, units}, {logits.get(), columns, images, padded, true}, weights);
  } else if (images > 0) {
    const int64_t rows = block_rows(images, columns, units, threads);
    const int64_t blocks = (images + rows - 1) / rows;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const Scratch logits(columns * rows), scratch(uncertainty_scratch(samples, classes)), out(rows);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * rows, count = std::min(rows, images - first);
        const int64_t stride = padded_rows(count);
        if (stride != count) std::fill(logits.get(), logits.get() + columns * stride, 0.f);
        multiply({logits.get(), columns, count, stride}, weights,
                 {f + first * units, count, units, units, true});
        sweep(logits.get(), stride, 0, count, out.get(), scratch.get());
        std::copy(out.get(), out.get() + count, values + first);
        multiply({df + first * units, count, units, units}, {logits.get(), columns, count, stride, true},
                 weights);
      }
    });
  }
  return {value, narrow_type ? torch::stable::to(gradient, features_in.scalar_type()) : gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) { m.impl("head_uncertainty", TORCH_BOX(&head_uncertainty)); }

}  // namespace tsynd
