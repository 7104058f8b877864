#include <tuple>

#include "common.h"

namespace tsynd {
namespace {

// logits [T, B, C]: a tile of neighbouring images is brought side by side in cache, worked on in place and
// written back, so memory is read once and written once.
std::tuple<Tensor, Tensor> logits_uncertainty(const Tensor& logits_in, const std::string& objective,
                                              const std::string& task) {
  const Objective goal = parse_objective(objective);
  const Task kind = parse_task(task);
  check_logits(logits_in);
  const int64_t samples = logits_in.size(0), images = logits_in.size(1), classes = logits_in.size(2);
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor value = new_values(logits, images);
  Tensor gradient = torch::stable::empty_like(logits);
  if (images == 0) return {value, gradient};

  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, tiles = (images + lanes - 1) / lanes;
  float* values = static_cast<float*>(value.mutable_data_ptr());
  torch::stable::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    const Scratch tile(samples * classes * lanes), scratch(uncertainty_scratch(samples, classes)),
        rows(classes * lanes);
    float tile_values[kMaxLanes];
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * lanes, count = std::min(lanes, images - first);
      if (count < lanes) std::fill(tile.get(), tile.get() + samples * classes * lanes, 0.f);
      for (int64_t t = 0; t < samples; ++t) {
        read_floats(logits, (t * images + first) * classes, count * classes, rows.get());
        float* to = tile.get() + t * classes * lanes;
        for (int64_t c = 0; c < classes; ++c)
          for (int64_t image = 0; image < count; ++image)
            to[c * lanes + image] = rows.get()[image * classes + c];
      }
      k.uncertainty({tile.get(), lanes, nullptr, samples, classes, goal, kind, tile_values, scratch.get()});
      std::copy(tile_values, tile_values + count, values + first);
      for (int64_t t = 0; t < samples; ++t) {
        const float* from = tile.get() + t * classes * lanes;
        for (int64_t image = 0; image < count; ++image)
          for (int64_t c = 0; c < classes; ++c) rows.get()[image * classes + c] = from[c * lanes + image];
        write_floats(rows.get(), count * classes, gradient, (t * images + first) * classes);
      }
    }
  });
  return {value, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) { m.impl("logits_uncertainty", TORCH_BOX(&logits_uncertainty)); }

}  // namespace tsynd
