// expected_information around torch's products, as on the CPU (docs/kernels.md): ratios of posterior samples
// to their means, the logarithms of joint probabilities with their sums, and the gradient.
#pragma once

#include "image_row.cuh"

namespace tsynd {

constexpr int kInformationThreads = 256;
constexpr int kInformationWarps = kInformationThreads / kWarp;

// Outcomes are the classes of a multiclass task (one group), or 1 and 0 of each label (a group each). Element
// (group, t, image, outcome) of what is found lies at ((group * samples + t) * images + image) * outcomes +
// outcome.
struct Ratios {
  int64_t images, pass_stride;  // pass_stride: logits from one pass to the next
  int samples, classes;
  bool multilabel;
};

// A block an image. ratio = p / mean - 1 and p, [groups][samples][images * outcomes] (p may be null);
// mean [groups][images * outcomes].
template <class T>
__global__ void __launch_bounds__(kInformationThreads)
    sample_ratios(const T* logits, float* ratio, float* p, float* mean, Ratios job) {
  using M = Math<float>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t image = blockIdx.x;
  const T* const from = logits + image * job.classes;
  const auto at = [&](int t, int c) { return to_float(from[t * job.pass_stride + c]); };
  const auto put = [&](int group, int t, int outcomes, int k, float log, float log_mean) {
    const int64_t to = ((static_cast<int64_t>(group) * job.samples + t) * job.images + image) * outcomes + k;
    ratio[to] = M::expm1(log - log_mean);
    if (p != nullptr) p[to] = M::exp(log);
  };
  const float inverse = 1.f / static_cast<float>(job.samples);
  if (job.multilabel) {
    for (int c = static_cast<int>(threadIdx.x); c < job.classes; c += kInformationThreads) {
      float top1 = 2.f * kLogFloor, top0 = top1, sum1 = 0.f, sum0 = 0.f;  // as log_mean of uncertainty.h
      for (int t = 0; t < job.samples; ++t) {
        const Bernoulli<M> b = bernoulli<M>(at(t, c));
        top1 = M::max(top1, b.log1);
        top0 = M::max(top0, b.log0);
      }
      for (int t = 0; t < job.samples; ++t) {
        const Bernoulli<M> b = bernoulli<M>(at(t, c));
        sum1 += M::expm1(b.log1 - top1);
        sum0 += M::expm1(b.log0 - top0);
      }
      const float log_mean1 = top1 + M::log1p(sum1 * inverse), log_mean0 = top0 + M::log1p(sum0 * inverse);
      for (int t = 0; t < job.samples; ++t) {
        const Bernoulli<M> b = bernoulli<M>(at(t, c));
        put(c, t, 2, 0, b.log1, log_mean1);
        put(c, t, 2, 1, b.log0, log_mean0);
      }
      float* const to = mean + (c * job.images + image) * 2;
      to[0] = M::exp(log_mean1);
      to[1] = M::exp(log_mean0);
    }
    return;
  }
  float* const top_of = reinterpret_cast<float*>(shared_memory());  // [T] largest logit
  float* const log_sum = top_of + job.samples;                      // [T] log of the sum of exponentials
  float* const log_mean = log_sum + job.samples;                    // [C]
  for (int t = warp; t < job.samples; t += kInformationWarps) {
    float top = -infinity(), rest = 0.f, ties = 0.f;
    for (int c = lane; c < job.classes; c += kWarp) top = M::max(top, at(t, c));
    top = team_max(top, kWarp);
    for (int c = lane; c < job.classes; c += kWarp) {
      const float shifted = M::max(at(t, c) - top, kLogFloor);
      rest += shifted < 0.f ? M::exp(shifted) : 0.f;
      ties += shifted < 0.f ? 0.f : 1.f;
    }
    rest = team_sum(rest, kWarp);
    ties = team_sum(ties, kWarp);
    if (lane == 0) {
      top_of[t] = top;
      log_sum[t] = M::log1p(rest + (ties - 1.f));
    }
  }
  sync_block();
  const auto logp = [&](int t, int c) { return M::max(at(t, c) - top_of[t], kLogFloor) - log_sum[t]; };
  for (int c = static_cast<int>(threadIdx.x); c < job.classes; c += kInformationThreads) {
    float top = 2.f * kLogFloor, sum = 0.f;
    for (int t = 0; t < job.samples; ++t) top = M::max(top, logp(t, c));
    for (int t = 0; t < job.samples; ++t) sum += M::expm1(logp(t, c) - top);
    log_mean[c] = top + M::log1p(sum * inverse);
    mean[image * job.classes + c] = M::exp(log_mean[c]);
  }
  sync_block();
  const int64_t count = static_cast<int64_t>(job.samples) * job.classes;
  for (int64_t i = threadIdx.x; i < count; i += kInformationThreads) {
    const int t = static_cast<int>(i / job.classes), c = static_cast<int>(i % job.classes);
    put(0, t, job.classes, c, logp(t, c), log_mean[c]);
  }
}

// out = mean times ratio, [groups][samples][columns], of mean [groups][columns].
template <class Float>
__global__ void __launch_bounds__(kInformationThreads)
    weigh_ratios(const Float* ratio, const Float* mean, Float* out, int64_t rows, int64_t samples,
                 int64_t columns) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kInformationThreads + threadIdx.x;
  if (i >= rows * columns) return;
  out[i] = mean[i / columns / samples * columns + i % columns] * ratio[i];
}

template <class Float>
__global__ void __launch_bounds__(kInformationThreads) add_to(Float* sum, const Float* more, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kInformationThreads + threadIdx.x;
  if (i < count) sum[i] += more[i];
}

// A warp a row of joint [rows][columns], sums over passes of ratio times ratio, which become log(1 + d) for
// d = joint * scale. excess += sum of mean (log(1 + d) - d); gained += sum of mean ((1 + d) log(1 + d) - d).
template <class Float>
__global__ void __launch_bounds__(kInformationThreads)
    joint_logs(Float* joint, const Float* mean, Float* excess, Float* gained, int64_t rows, int64_t columns,
               float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kInformationWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  float lost = 0.f, won = 0.f;
  for (int64_t j = lane; j < columns; j += kWarp) {
    Float* const at = joint + row * columns + j;
    const JointRatio<Math<float>> ratio = joint_ratio<Math<float>>(*at * scale);
    lost += mean[j] * ratio.excess;
    won += mean[j] * (ratio.excess + ratio.d * ratio.log);
    *at = ratio.log;
  }
  lost = team_sum(lost, kWarp);
  won = team_sum(won, kWarp);
  if (lane == 0) {
    excess[row] += lost;
    gained[row] += won;
  }
}

// From slope [groups][samples][images * outcomes], sums over targets of their weighted ratios times
// logarithms.
struct InformationGradient {
  int64_t images, pass_stride;  // pass_stride: of the gradient
  int samples, classes, lanes;  // lanes: of a warp that share a pass of an image, a power of two
  bool multilabel;
  float share;  // 1 / targets
};

// A team a pass of an image; that of pass 0 also finds the image's value.
template <class T>
__global__ void __launch_bounds__(kInformationThreads)
    information_gradient(const float* slope, const float* p, const float* mean, const float* excess,
                         const float* gained, T* gradient, float* value, InformationGradient job) {
  const int member = static_cast<int>(threadIdx.x) % job.lanes;
  const int64_t team = (static_cast<int64_t>(blockIdx.x) * kInformationThreads + threadIdx.x) / job.lanes,
                teams = job.samples * job.images;
  const bool real = team < teams;  // lanes without a pass still take part in the exchanges
  const int64_t t = real ? team / job.images : 0, image = real ? team % job.images : 0;
  T* const to = gradient + t * job.pass_stride + image * job.classes;
  const float scale = job.share / static_cast<float>(job.samples);
  float total = 0.f;
  if (job.multilabel) {
    for (int c = member; real && c < job.classes; c += job.lanes) {
      const int64_t row = (c * job.images + image) * 2,
                    at = ((static_cast<int64_t>(c) * job.samples + t) * job.images + image) * 2;
      const float difference = (slope[at] + excess[row]) - (slope[at + 1] + excess[row + 1]);
      to[c] = from_float<T>(p[at] * p[at + 1] * difference * scale);
      total += mean[row] * gained[row] + mean[row + 1] * gained[row + 1];
    }
  } else {
    const int64_t row = image * job.classes, at = (t * job.images + image) * job.classes;
    float inner = 0.f;
    for (int c = member; c < job.classes; c += job.lanes)
      inner += p[at + c] * (slope[at + c] + excess[row + c]);
    inner = team_sum(inner, job.lanes);
    for (int c = member; real && c < job.classes; c += job.lanes) {
      to[c] = from_float<T>(p[at + c] * (slope[at + c] + excess[row + c] - inner) * scale);
      total += mean[row + c] * gained[row + c];
    }
  }
  total = team_sum(total, job.lanes);
  if (real && t == 0 && member == 0) value[image] = total * job.share;
}

template <class T>
void run_sample_ratios(Stream stream, const T* logits, float* ratio, float* p, float* mean, const Ratios& job,
                       int64_t shared_bytes) {
  launch(stream, sample_ratios<T>, job.images, kInformationThreads, shared_bytes, logits, ratio, p, mean,
         job);
}

inline void run_weigh_ratios(Stream stream, const float* ratio, const float* mean, float* out, int64_t rows,
                             int64_t samples, int64_t columns) {
  launch(stream, weigh_ratios<float>, blocks_for(rows * columns, kInformationThreads), kInformationThreads, 0,
         ratio, mean, out, rows, samples, columns);
}

inline void run_add_to(Stream stream, float* sum, const float* more, int64_t count) {
  launch(stream, add_to<float>, blocks_for(count, kInformationThreads), kInformationThreads, 0, sum, more,
         count);
}

inline void run_joint_logs(Stream stream, float* joint, const float* mean, float* excess, float* gained,
                           int64_t rows, int64_t columns, float scale) {
  launch(stream, joint_logs<float>, blocks_for(rows, kInformationWarps), kInformationThreads, 0, joint, mean,
         excess, gained, rows, columns, scale);
}

template <class T>
void run_information_gradient(Stream stream, const float* slope, const float* p, const float* mean,
                              const float* excess, const float* gained, T* gradient, float* value,
                              InformationGradient job) {
  job.lanes = job.classes >= kWarp ? kWarp : next_power_of_two(job.classes);
  launch(stream, information_gradient<T>,
         blocks_for(job.samples * job.images * job.lanes, kInformationThreads), kInformationThreads, 0, slope,
         p, mean, excess, gained, gradient, value, job);
}

}  // namespace tsynd
