#include "common.h"
#include "dropout_mask.cuh"

namespace tsynd {
namespace {

MaskStream stream_of(int64_t seed, int64_t layer, uint32_t keep) {
  const MaskAddress at = mask_address(seed, layer, 0);
  return {at.key0, at.key1, at.layer, keep_test(keep)};
}

Tensor dropout_mask(int64_t units, double p, int64_t samples, int64_t seed, int64_t layer,
                    const Tensor& sample_ids_in) {
  const uint32_t keep = keep_count(p);
  check_mask(units, samples, layer, sample_ids_in);
  const torch::stable::accelerator::DeviceGuard guard(sample_ids_in.get_device_index());
  const Tensor sample_ids = torch::stable::contiguous(sample_ids_in);
  const int64_t images = sample_ids.size(0), rows = samples * images;
  Tensor mask = torch::stable::new_empty(sample_ids, {samples, images, units}, ScalarType::Bool);
  if (mask.numel() == 0) return mask;
  const int64_t blocks = (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
  launch(current_stream(mask), mask_bytes<uint8_t>, blocks_for(rows * blocks, kMaskThreads), kMaskThreads, 0,
         write_pointer<uint8_t>(mask), read_pointer<int64_t>(sample_ids), rows, images, units,
         stream_of(seed, layer, keep));
  return mask;
}

Expansion expansion_of(const Tensor& tensor, int64_t images, double p, int64_t samples, int64_t seed,
                       int64_t layer, const Tensor& sample_ids, bool passes) {
  const uint32_t keep = keep_count(p);
  return {images,
          tensor.size(1),
          tensor.size(2),
          0,
          static_cast<int>(samples),
          passes,
          sample_ids.size(0) == 1,
          stream_of(seed, layer, keep),
          256.f / static_cast<float>(keep)};
}

Tensor dropout_expand(const Tensor& input_in, double p, int64_t samples, int64_t seed, int64_t layer,
                      const Tensor& sample_ids_in, bool passes) {
  const int64_t images = check_expand(input_in, "input", samples, layer, sample_ids_in, passes);
  const torch::stable::accelerator::DeviceGuard guard(input_in.get_device_index());
  const Tensor input = torch::stable::contiguous(input_in), ids = torch::stable::contiguous(sample_ids_in);
  Tensor out =
      torch::stable::new_empty(input, {samples * images, input.size(1), input.size(2)}, input.scalar_type());
  if (out.numel() == 0) return out;
  const Expansion job = expansion_of(input, images, p, samples, seed, layer, ids, passes);
  with_dtype(input, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_expand<T>(current_stream(input), read_pointer<T>(input), write_pointer<T>(out),
                  read_pointer<int64_t>(ids), job);
  });
  return out;
}

Tensor dropout_gather(const Tensor& gradient_in, double p, int64_t samples, int64_t seed, int64_t layer,
                      const Tensor& sample_ids_in, bool passes) {
  const int64_t images = check_expand(gradient_in, "gradient", samples, layer, sample_ids_in, true);
  const torch::stable::accelerator::DeviceGuard guard(gradient_in.get_device_index());
  const Tensor gradient = torch::stable::contiguous(gradient_in),
               ids = torch::stable::contiguous(sample_ids_in);
  const int64_t rows = passes ? samples * images : images;
  Tensor in =
      torch::stable::new_empty(gradient, {rows, gradient.size(1), gradient.size(2)}, gradient.scalar_type());
  if (in.numel() == 0) return in;
  const Expansion job = expansion_of(gradient, images, p, samples, seed, layer, ids, passes);
  with_dtype(gradient, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_gather<T, T, false>(current_stream(gradient), read_pointer<T>(gradient), write_pointer<T>(in),
                            read_pointer<int64_t>(ids), job);
  });
  return in;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CUDA, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
  m.impl("dropout_expand", TORCH_BOX(&dropout_expand));
  m.impl("dropout_gather", TORCH_BOX(&dropout_gather));
}

}  // namespace tsynd
