// One ascent step and projection, in place: latents, gradient and origin are read once where an image's
// values fit the team's registers, and the latents written once.
#pragma once

#include "device.h"

namespace tsynd {

constexpr int kAscendThreads = 256;
constexpr int kAscendItems = 8;  // values a thread keeps in registers

struct AscendStep {
  int64_t images, count;
  float step, radius;
  bool l2;
  int team;  // threads an image: a warp or the whole block
};

TSYND_DEVICE double shuffle_xor_double(double x, int offset) {
  // as two words
  union {
    double value;
    float word[2];
  } both;
  both.value = x;
  both.word[0] = shuffle_xor(both.word[0], offset);
  both.word[1] = shuffle_xor(both.word[1], offset);
  return both.value;
}

// Sum over the team. Squares are summed in double: a confident classifier's gradient of 1e-22 has a direction
// too.
TSYND_DEVICE double team_sum_double(double x, bool whole_block, double* scratch) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += shuffle_xor_double(x, offset);
  if (!whole_block) return x;
  sync_block();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  sync_block();
  x = 0.;
  for (int w = 0; w < kAscendThreads / kWarp; ++w) x += scratch[w];
  return x;
}

template <class T>
__global__ void __launch_bounds__(kAscendThreads)
    ascend_step(T* latents, const T* gradient, const T* origin, AscendStep job) {
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  const bool whole_block = job.team > kWarp;
  const int member = static_cast<int>(threadIdx.x) % job.team;
  const int64_t image = (static_cast<int64_t>(blockIdx.x) * kAscendThreads + threadIdx.x) / job.team;
  if (image >= job.images) return;  // whole teams
  T* const z = latents + image * job.count;
  const T* const g = gradient + image * job.count;
  const T* const z0 = origin + image * job.count;
  float kept_z[kAscendItems], kept_g[kAscendItems], kept_z0[kAscendItems];
  double squares = 0.;
  for (int64_t base = 0; base < job.count; base += static_cast<int64_t>(job.team) * kAscendItems)
#pragma unroll
    for (int k = 0; k < kAscendItems; ++k) {
      const int64_t i = base + static_cast<int64_t>(k) * job.team + member;
      if (i >= job.count) continue;
      const float slope = to_float(g[i]);
      squares += static_cast<double>(slope) * slope;
      if (base == 0) {
        kept_g[k] = slope;
        kept_z[k] = to_float(z[i]);
        kept_z0[k] = to_float(z0[i]);
      }
    }
  squares = team_sum_double(squares, whole_block, scratch);
  // a zero or non-finite gradient moves nothing
  if (!(squares > 0. && squares < static_cast<double>(infinity()))) return;
  const double along = job.l2 ? static_cast<double>(job.step) / sqrt(squares) : 0.;
  const auto moved = [&](float from, float slope, float center) {
    float step = static_cast<float>(slope * along);
    if (!job.l2) step = slope > 0.f ? job.step : slope < 0.f ? -job.step : 0.f;
    return from - center + step;
  };
  double length = 0.;
  if (job.l2) {
    for (int64_t base = 0; base < job.count; base += static_cast<int64_t>(job.team) * kAscendItems)
#pragma unroll
      for (int k = 0; k < kAscendItems; ++k) {
        const int64_t i = base + static_cast<int64_t>(k) * job.team + member;
        if (i >= job.count) continue;
        const float offset = base == 0 ? moved(kept_z[k], kept_g[k], kept_z0[k])
                                       : moved(to_float(z[i]), to_float(g[i]), to_float(z0[i]));
        length += static_cast<double>(offset) * offset;
      }
    length = sqrt(team_sum_double(length, whole_block, scratch));
  }
  const float shrink = length > job.radius ? static_cast<float>(job.radius / length) : 1.f;
  for (int64_t base = 0; base < job.count; base += static_cast<int64_t>(job.team) * kAscendItems)
#pragma unroll
    for (int k = 0; k < kAscendItems; ++k) {
      const int64_t i = base + static_cast<int64_t>(k) * job.team + member;
      if (i >= job.count) continue;
      const float center = base == 0 ? kept_z0[k] : to_float(z0[i]);
      float offset =
          base == 0 ? moved(kept_z[k], kept_g[k], center) : moved(to_float(z[i]), to_float(g[i]), center);
      if (job.l2) {
        offset *= shrink;
      } else {
        offset = offset > job.radius ? job.radius : offset < -job.radius ? -job.radius : offset;
      }
      z[i] = from_float<T>(center + offset);
    }
}

template <class T>
void run_ascend(Stream stream, T* latents, const T* gradient, const T* origin, AscendStep job) {
  job.team = job.count <= kWarp * kAscendItems ? kWarp : kAscendThreads;
  launch(stream, ascend_step<T>, blocks_for(job.images * job.team, kAscendThreads), kAscendThreads,
         static_cast<int64_t>(sizeof(double)) * kAscendThreads / kWarp, latents, gradient, origin, job);
}

}  // namespace tsynd
