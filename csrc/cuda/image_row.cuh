// An image's uncertainty and logit gradient by a few lanes of a warp, the logits in their registers.
#pragma once

#include "device.h"

namespace tsynd {

TSYND_DEVICE float team_max(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = QuickMath::max(x, shuffle_xor(x, offset));
  return x;
}

TSYND_DEVICE float team_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += shuffle_xor(x, offset);
  return x;
}

struct RowTask {
  int samples, classes;
  bool entropy, multilabel;
};

// Sum over labels of the binary uncertainty of one image, with logits [T][kStride] in shared memory, replaced
// by their gradient. The team's lanes share out the labels; loops instead of registers, for a label needs two
// logarithms of every pass. Every lane of the warp must call it; what it leaves in memory is there after
// sync_warp.
template <class M, int kStride>
TSYND_DEVICE float multilabel_row(float* logits, const RowTask& row, int lane, int lanes) {
  const float inverse = 1.f / static_cast<float>(row.samples);
  float total = 0.f;
  for (int c = lane; c < row.classes; c += lanes) {
    float top1 = 2.f * kLogFloor, top0 = 2.f * kLogFloor, sum1 = 0.f,
          sum0 = 0.f;  // as log_mean of uncertainty.h
    for (int t = 0; t < row.samples; ++t) {
      const Bernoulli<M> b = bernoulli<M>(logits[t * kStride + c]);
      top1 = M::max(top1, b.log1);
      top0 = M::max(top0, b.log0);
    }
    for (int t = 0; t < row.samples; ++t) {
      const Bernoulli<M> b = bernoulli<M>(logits[t * kStride + c]);
      sum1 += M::expm1(b.log1 - top1);
      sum0 += M::expm1(b.log0 - top0);
    }
    const float q1 = top1 + M::log1p(sum1 * inverse), q0 = top0 + M::log1p(sum0 * inverse);
    for (int t = 0; t < row.samples; ++t) {
      const Bernoulli<M> b = bernoulli<M>(logits[t * kStride + c]);
      const float r1 = (row.entropy ? 0.f : b.log1) - q1, r0 = (row.entropy ? 0.f : b.log0) - q0;
      const float p1 = M::exp(b.log1), p0 = M::exp(b.log0);
      total += p1 * r1 + p0 * r0;
      logits[t * kStride + c] = p1 * p0 * (r1 - r0) * inverse;
    }
  }
  return M::max(team_sum(total, lanes) * inverse, 0.f);
}

// The team's lanes have all passes of the image. A team that has only some of them brings, instead, the means
// to put them together with the rest: merge(tops, sums) and total(sum), see wgmma_head.cuh.
struct WholeImage {
  static constexpr bool kWhole = true;
};

// The team's lane owns whole passes, number pass_of(g) for g below kPasses: a softmax needs no other lane,
// and the mean over passes one exchange per class. Logits of absent classes are -inf; absent passes are
// skipped.
//
// In: v[g][c], logits. Out: their gradient. Every lane of the warp must call it; the team's lanes all return
// the value.
template <class M, int kPasses, int kClasses, class PassOf, class Rest = WholeImage>
TSYND_DEVICE float multiclass_row(float (&v)[kPasses][kClasses], const RowTask& row, int lanes,
                                  const PassOf& pass_of, const Rest& rest_of_image = {}) {
  const float inverse = M::inverse(static_cast<float>(row.samples));
#pragma unroll
  for (int g = 0; g < kPasses; ++g) {
    float top = v[g][0];
#pragma unroll
    for (int c = 1; c < kClasses; ++c) top = M::max(top, v[g][c]);
    // the sum of exponentials is ties + rest, ties being those equal to the largest
    float rest = 0.f, ties = -1.f;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      v[g][c] = M::max(v[g][c] - top, kLogFloor);
      rest += v[g][c] < 0.f ? M::exp(v[g][c]) : 0.f;
      ties += v[g][c] < 0.f ? 0.f : 1.f;
    }
    const float log_sum = M::log1p(rest + ties);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) v[g][c] -= log_sum;
  }
  float log_mean[kClasses];  // as log_mean of uncertainty.h
  float sums[kClasses];      // of a part of the image, relative to its own largest, which is in log_mean
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    float top = 2.f * kLogFloor, sum = 0.f;
#pragma unroll
    for (int g = 0; g < kPasses; ++g)
      if (pass_of(g) < row.samples) top = M::max(top, v[g][c]);
    top = team_max(top, lanes);
#pragma unroll
    for (int g = 0; g < kPasses; ++g)
      if (pass_of(g) < row.samples) sum += M::expm1(v[g][c] - top);
    sum = team_sum(sum, lanes);
    if constexpr (Rest::kWhole)
      log_mean[c] = top + M::log1p(sum * inverse);
    else
      log_mean[c] = top, sums[c] = sum;
  }
  if constexpr (!Rest::kWhole) {
    rest_of_image.merge(log_mean, sums);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) log_mean[c] += M::log1p(sums[c] * inverse);
  }
  float total = 0.f;
#pragma unroll
  for (int g = 0; g < kPasses; ++g) {
    const bool present = pass_of(g) < row.samples;
    float inner = 0.f, p[kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      p[c] = M::exp(v[g][c]);
      v[g][c] = (row.entropy ? 0.f : v[g][c]) - log_mean[c];
      inner += p[c] * v[g][c];
    }
    total += present ? inner : 0.f;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) v[g][c] = present ? p[c] * (v[g][c] - inner) * inverse : 0.f;
  }
  total = team_sum(total, lanes);
  if constexpr (!Rest::kWhole) total = rest_of_image.total(total);
  return M::max(total * inverse, 0.f);
}

// The same with passes dealt to the lanes in turn: lane `lane` has g * lanes + lane.
template <class M, int kPasses, int kClasses>
TSYND_DEVICE float multiclass_row(float (&v)[kPasses][kClasses], const RowTask& row, int lane, int lanes) {
  return multiclass_row<M>(v, row, lanes, [&](int g) { return g * lanes + lane; });
}

}  // namespace tsynd
