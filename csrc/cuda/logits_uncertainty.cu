#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../checks.h"
#include "stream.h"

namespace tsynd {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kBlocksPerMultiprocessor = 8;  // 64 registers a thread: without it ptxas picks 32 and spills

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// The scalar policy of uncertainty.h on the device.
struct Scalar {
  using V = float;
  TSYND_HD float splat(float x) { return x; }
  TSYND_HD float exp(float x) { return expf(x); }
  TSYND_HD float expm1(float x) { return expm1f(x); }
  TSYND_HD float log1p(float x) { return log1pf(x); }
  TSYND_HD float max(float a, float b) { return a < b ? b : a; }
  TSYND_HD float select(bool mask, float a, float b) { return mask ? a : b; }
  TSYND_HD bool less(float a, float b) { return a < b; }
};

__device__ __forceinline__ float group_max(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x = Scalar::max(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

__device__ __forceinline__ float group_sum(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Sum over the lanes that hold the same position in their groups.
__device__ __forceinline__ float across_groups(float x, int width) {
  for (int offset = kWarp / 2; offset >= width; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// A warp owns an image. Its lanes form groups of `width` (a power of two, at least the classes where that
// fits); a group takes a pass at a time, so neighbouring lanes read neighbouring classes. Shared memory holds
// a few floats per pass and per class; the logits are read three times, the later times from cache.
struct Layout {
  int64_t samples, images, classes;
  int width;
  bool entropy;
};

struct Lane {
  int group, groups, member;
};

__device__ __forceinline__ Lane lane_of(const Layout& layout) {
  const int lane = threadIdx.x % kWarp;
  return {lane / layout.width, kWarp / layout.width, lane % layout.width};
}

// log_mean of uncertainty.h for this lane's class, the passes shared out over the groups; every lane of the
// warp must call it.
template <class LogP>
__device__ __forceinline__ float log_mean_over_passes(const LogP& logp, bool active, const Layout& layout,
                                                      const Lane& lane) {
  float top = 2.f * kLogFloor, sum = 0.f;
  if (active)
    for (int64_t t = lane.group; t < layout.samples; t += lane.groups) top = Scalar::max(top, logp(t));
  for (int offset = kWarp / 2; offset >= layout.width; offset /= 2)
    top = Scalar::max(top, __shfl_xor_sync(~0u, top, offset));
  if (active)
    for (int64_t t = lane.group; t < layout.samples; t += lane.groups) sum += Scalar::expm1(logp(t) - top);
  sum = across_groups(sum, layout.width);
  return top + Scalar::log1p(sum / static_cast<float>(layout.samples));
}

template <class T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, kBlocksPerMultiprocessor)
    multiclass_kernel(const T* __restrict__ logits, T* __restrict__ gradient, float* __restrict__ value,
                      Layout layout) {
  extern __shared__ float shared[];
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  float* top_of = shared + warp * (2 * layout.samples + layout.classes);  // [T] largest logit
  float* log_sum = top_of + layout.samples;  // [T] log of the sum of shifted exps
  float* log_q = log_sum + layout.samples;   // [C] log mean probability
  const int64_t image = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (image >= layout.images) return;
  const Lane lane = lane_of(layout);
  const int64_t pass = layout.images * layout.classes,
                rounds = (layout.samples + lane.groups - 1) / lane.groups;
  const T* in = logits + image * layout.classes;
  T* out = gradient + image * layout.classes;
  const auto shifted = [&](int64_t t, int64_t c, float top) {
    return Scalar::max(load(in + t * pass + c) - top, kLogFloor);
  };
  const auto logp = [&](int64_t t, int64_t c) { return shifted(t, c, top_of[t]) - log_sum[t]; };

  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t t = round * lane.groups + lane.group;
    const bool active = t < layout.samples;
    float top = -__int_as_float(0x7f800000), rest = 0.f, ties = 0.f;
    if (active)
      for (int64_t c = lane.member; c < layout.classes; c += layout.width)
        top = Scalar::max(top, load(in + t * pass + c));
    top = group_max(top, layout.width);
    if (active)
      for (int64_t c = lane.member; c < layout.classes; c += layout.width) {
        const float s = shifted(t, c, top);
        rest += s < 0.f ? expf(s) : 0.f;
        ties += s < 0.f ? 0.f : 1.f;
      }
    rest = group_sum(rest, layout.width);
    ties = group_sum(ties, layout.width);
    if (active && lane.member == 0) {
      top_of[t] = top;
      log_sum[t] = log1pf(rest + (ties - 1.f));
    }
  }
  __syncwarp();
  for (int64_t base = 0; base < layout.classes; base += layout.width) {
    const int64_t c = base + lane.member;
    const bool active = c < layout.classes;
    const float result = log_mean_over_passes([&](int64_t t) { return logp(t, c); }, active, layout, lane);
    if (active && lane.group == 0) log_q[c] = result;
  }
  __syncwarp();
  const float inverse = 1.f / static_cast<float>(layout.samples);
  float total = 0.f;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t t = round * lane.groups + lane.group;
    const bool active = t < layout.samples;
    float inner = 0.f;
    if (active)
      for (int64_t c = lane.member; c < layout.classes; c += layout.width) {
        const float l = logp(t, c);
        inner += expf(l) * ((layout.entropy ? 0.f : l) - log_q[c]);
      }
    inner = group_sum(inner, layout.width);
    if (active) {
      total += lane.member == 0 ? inner : 0.f;
      for (int64_t c = lane.member; c < layout.classes; c += layout.width) {
        const float l = logp(t, c);
        store(out + t * pass + c, expf(l) * ((layout.entropy ? 0.f : l) - log_q[c] - inner) * inverse);
      }
    }
  }
  total = group_sum(total, kWarp);
  if (threadIdx.x % kWarp == 0) value[image] = Scalar::max(total * inverse, 0.f);
}

template <class T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, kBlocksPerMultiprocessor)
    multilabel_kernel(const T* __restrict__ logits, T* __restrict__ gradient, float* __restrict__ value,
                      Layout layout) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t image = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (image >= layout.images) return;
  const Lane lane = lane_of(layout);
  const int64_t pass = layout.images * layout.classes;
  const T* in = logits + image * layout.classes;
  T* out = gradient + image * layout.classes;
  const float inverse = 1.f / static_cast<float>(layout.samples);
  float total = 0.f;
  for (int64_t base = 0; base < layout.classes; base += layout.width) {
    const int64_t c = base + lane.member;
    const bool active = c < layout.classes;
    const auto at = [&](int64_t t) { return bernoulli<Scalar>(load(in + t * pass + c)); };
    const float q1 = log_mean_over_passes([&](int64_t t) { return at(t).log1; }, active, layout, lane);
    const float q0 = log_mean_over_passes([&](int64_t t) { return at(t).log0; }, active, layout, lane);
    if (!active) continue;
    for (int64_t t = lane.group; t < layout.samples; t += lane.groups) {
      const Bernoulli<Scalar> b = at(t);
      const float r1 = (layout.entropy ? 0.f : b.log1) - q1, r0 = (layout.entropy ? 0.f : b.log0) - q0;
      const float p1 = expf(b.log1), p0 = expf(b.log0);
      total += p1 * r1 + p0 * r0;
      store(out + t * pass + c, p1 * p0 * (r1 - r0) * inverse);
    }
  }
  total = group_sum(total, kWarp);
  if (threadIdx.x % kWarp == 0) value[image] = Scalar::max(total * inverse, 0.f);
}

template <class T>
void launch(const Tensor& logits, const Tensor& gradient, const Tensor& value, Objective objective, Task task,
            cudaStream_t stream) {
  Layout layout{logits.size(0), logits.size(1), logits.size(2), 1, objective == Objective::kEntropy};
  while (layout.width < kWarp && layout.width < layout.classes) layout.width *= 2;
  const int64_t per_warp = task == Task::kMulticlass ? 4 * (2 * layout.samples + layout.classes) : 0;
  const int64_t budget = 48 * 1024;
  STD_TORCH_CHECK(per_warp <= budget, "logits: got shape ", shape_of(logits),
                  ", wanted 2 * samples + classes of at most ", budget / 4);
  int64_t warps = kWarpsPerBlock;
  while (warps * per_warp > budget) --warps;
  const int64_t blocks = (layout.images + warps - 1) / warps;
  STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "logits: got ", layout.images, " images, more than a grid holds");
  const T* in = static_cast<const T*>(logits.const_data_ptr());
  T* out = static_cast<T*>(gradient.mutable_data_ptr());
  float* values = static_cast<float*>(value.mutable_data_ptr());
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(kWarp * warps));
  const size_t bytes = static_cast<size_t>(warps * per_warp);
  if (task == Task::kMulticlass)
    multiclass_kernel<T><<<grid, block, bytes, stream>>>(in, out, values, layout);
  else
    multilabel_kernel<T><<<grid, block, 0, stream>>>(in, out, values, layout);
  check_launch("logits_uncertainty");
}

std::tuple<Tensor, Tensor> logits_uncertainty(const Tensor& logits_in, const std::string& objective,
                                              const std::string& task) {
  const Objective goal = parse_objective(objective);
  const Task kind = parse_task(task);
  check_rank(logits_in, "logits", 3, "[samples, images, classes]");
  check_samples(logits_in.size(0));
  check_sizes(logits_in.size(2), 1);
  const torch::stable::accelerator::DeviceGuard guard(logits_in.get_device_index());
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor value = torch::stable::new_empty(logits, {logits.size(1)}, ScalarType::Float);
  Tensor gradient = torch::stable::empty_like(logits);
  if (logits.size(1) == 0) return {value, gradient};
  const cudaStream_t stream = current_stream(logits.get_device_index());
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      launch<float>(logits, gradient, value, goal, kind, stream);
      break;
    case ScalarType::Half:
      launch<__half>(logits, gradient, value, goal, kind, stream);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(logits, gradient, value, goal, kind, stream);
      break;
    default:
      STD_TORCH_CHECK(false, "logits: wanted dtype float32, float16 or bfloat16 on CUDA");
  }
  return {value, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CUDA, m) { m.impl("logits_uncertainty", TORCH_BOX(&logits_uncertainty)); }

}  // namespace tsynd
