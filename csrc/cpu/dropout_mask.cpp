#include <vector>

#include "common.h"

namespace tsynd {
namespace {

// Rows of [units, inner] values: the `small` side has one an image (or one an image and pass), the `large`
// side one an image and pass. Forward reads small and writes large, backward sums large into small.
struct Job {
  int64_t images, units, inner, samples;
  bool passes, shared;  // small has passes too; one sample id for all images
  uint32_t keep;
  int64_t seed, layer;
  const int64_t* ids;
  float scale;

  int64_t size() const { return units * inner; }
  void mask(int64_t t, int64_t image, uint8_t* bytes) const {
    kernels().mask_bytes(bytes, units, static_cast<uint32_t>(t), keep,
                         mask_address(seed, layer, ids[shared ? 0 : image]));
  }
};

Job job_of(const Tensor& tensor, int64_t images, double p, int64_t samples, int64_t seed, int64_t layer,
           const Tensor& sample_ids, bool passes) {
  const uint32_t keep = keep_count(p);
  return Job{images,
             tensor.size(1),
             tensor.size(2),
             samples,
             passes,
             sample_ids.size(0) == 1,
             keep,
             seed,
             layer,
             static_cast<const int64_t*>(sample_ids.const_data_ptr()),
             256.f / static_cast<float>(keep)};
}

int64_t grain_of(const Job& job) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, job.size())); }

template <class T>
void expand(const Job& job, const T* input, T* out) {
  torch::stable::parallel_for(0, job.samples * job.images, grain_of(job), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> mask(static_cast<size_t>(job.units));
    for (int64_t row = begin; row < end; ++row) {
      job.mask(row / job.images, row % job.images, mask.data());
      const T* from = input + (job.passes ? row : row % job.images) * job.size();
      T* to = out + row * job.size();
      for (int64_t unit = 0; unit < job.units; ++unit) {
        for (int64_t i = unit * job.inner; i < (unit + 1) * job.inner; ++i)
          to[i] = mask[unit] ? static_cast<T>(static_cast<float>(from[i]) * job.scale) : static_cast<T>(0.f);
      }
    }
  });
}

template <class T>
void gather(const Job& job, const T* gradient, T* in) {
  const int64_t rows = job.passes ? job.samples * job.images : job.images;
  torch::stable::parallel_for(0, rows, grain_of(job), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> mask(static_cast<size_t>(job.units));
    std::vector<float> sum(static_cast<size_t>(job.size()));
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sum.begin(), sum.end(), 0.f);
      const int64_t image = row % job.images;
      for (int64_t t = job.passes ? row / job.images : 0, last = job.passes ? t + 1 : job.samples; t < last;
           ++t) {
        job.mask(t, image, mask.data());
        const T* from = gradient + (t * job.images + image) * job.size();
        for (int64_t unit = 0; unit < job.units; ++unit)
          if (mask[unit])
            for (int64_t i = unit * job.inner; i < (unit + 1) * job.inner; ++i)
              sum[i] += static_cast<float>(from[i]);
      }
      T* to = in + row * job.size();
      for (int64_t i = 0; i < job.size(); ++i) to[i] = static_cast<T>(sum[i] * job.scale);
    }
  });
}

Tensor dropout_expand(const Tensor& input_in, double p, int64_t samples, int64_t seed, int64_t layer,
                      const Tensor& sample_ids_in, bool passes) {
  const int64_t images = check_expand(input_in, "input", samples, layer, sample_ids_in, passes);
  const Tensor input = torch::stable::contiguous(input_in), ids = torch::stable::contiguous(sample_ids_in);
  Tensor out =
      torch::stable::new_empty(input, {samples * images, input.size(1), input.size(2)}, input.scalar_type());
  if (out.numel() == 0) return out;
  const Job job = job_of(input, images, p, samples, seed, layer, ids, passes);
  if (input.scalar_type() == ScalarType::Float)
    expand(job, static_cast<const float*>(input.const_data_ptr()),
           static_cast<float*>(out.mutable_data_ptr()));
  else
    expand(job, static_cast<const BFloat16*>(input.const_data_ptr()),
           static_cast<BFloat16*>(out.mutable_data_ptr()));
  return out;
}

Tensor dropout_gather(const Tensor& gradient_in, double p, int64_t samples, int64_t seed, int64_t layer,
                      const Tensor& sample_ids_in, bool passes) {
  const int64_t images = check_expand(gradient_in, "gradient", samples, layer, sample_ids_in, true);
  const Tensor gradient = torch::stable::contiguous(gradient_in),
               ids = torch::stable::contiguous(sample_ids_in);
  const int64_t rows = passes ? samples * images : images;
  Tensor in =
      torch::stable::new_empty(gradient, {rows, gradient.size(1), gradient.size(2)}, gradient.scalar_type());
  if (in.numel() == 0) return in;
  const Job job = job_of(gradient, images, p, samples, seed, layer, ids, passes);
  if (gradient.scalar_type() == ScalarType::Float)
    gather(job, static_cast<const float*>(gradient.const_data_ptr()),
           static_cast<float*>(in.mutable_data_ptr()));
  else
    gather(job, static_cast<const BFloat16*>(gradient.const_data_ptr()),
           static_cast<BFloat16*>(in.mutable_data_ptr()));
  return in;
}

// mask [T, N, units] (bool): addressed by (seed, layer, pass, sample id, unit) alone.
Tensor dropout_mask(int64_t units, double p, int64_t samples, int64_t seed, int64_t layer,
                    const Tensor& sample_ids_in) {
  const uint32_t keep = keep_count(p);
  check_mask(units, samples, layer, sample_ids_in);
  const Tensor sample_ids = torch::stable::contiguous(sample_ids_in);
  const int64_t images = sample_ids.size(0);
  const int64_t* ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  Tensor mask = torch::stable::new_empty(sample_ids, {samples, images, units}, ScalarType::Bool);
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, units));
  torch::stable::parallel_for(0, samples * images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels().mask_bytes(out + row * units, units, static_cast<uint32_t>(row / images), keep,
                           mask_address(seed, layer, ids[row % images]));
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) {
  m.impl("dropout_expand", TORCH_BOX(&dropout_expand));
  m.impl("dropout_gather", TORCH_BOX(&dropout_gather));
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace tsynd
