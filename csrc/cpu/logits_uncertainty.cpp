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
  const bool bf16 = logits.scalar_type() == ScalarType::BFloat16;
  const int64_t bytes = static_cast<int64_t>(logits.element_size());
  const char* from = static_cast<const char*>(logits.const_data_ptr());
  char* to = static_cast<char*>(gradient.mutable_data_ptr());
  float* values = static_cast<float*>(value.mutable_data_ptr());
  torch::stable::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    const Scratch scratch(logits_scratch(samples, classes));
    float tile_values[kMaxLanes];
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * lanes, count = std::min(lanes, images - first);
      const int64_t offset = first * classes * bytes;
      k.logits({from + offset, to + offset, images * classes, count, samples, classes, goal, kind, bf16,
                tile_values, scratch.get()});
      std::copy(tile_values, tile_values + count, values + first);
    }
  });
  return {value, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) { m.impl("logits_uncertainty", TORCH_BOX(&logits_uncertainty)); }

}  // namespace tsynd
