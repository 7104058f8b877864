// The per-image arithmetic: from T posterior samples' logits to the uncertainty and its gradient with
// respect to every logit. One source for scalar host code, vector CPU code (a lane is an image) and CUDA.
//
// With r_tk = log p_tk - log pbar_k and log pbar_k = logsumexp_t(log p_tk) - log T:
//   MI = mean_t sum_k p_tk r_tk          dMI/dlogit_tk = p_tk (r_tk - sum_j p_tj r_tj) / T
// and the entropy H[pbar] is the same two formulas with r_tk = -log pbar_k. Everything starts from
// log-softmax, so saturated logits give finite values and gradients.
#pragma once

#include "philox.h"

namespace tsynd {

enum class Objective : int { kMutualInformation = 0, kEntropy = 1 };
enum class Task : int { kMulticlass = 0, kMultilabel = 1 };

// Below any log-probability that matters, far from overflow: stands in for -inf so that 0 * r stays 0.
constexpr float kLogFloor = -1e30f;
// A mean probability below this is recomputed by a shifted log-sum-exp: the plain sum may have underflowed.
constexpr float kMeanFloor = 1e-30f;

// A Math policy M gives: V (a value per image), exp (arguments <= 0), log (positive arguments), max(a, b)
// returning a when a is NaN, select(mask, a, b), less(a, b), any(mask), splat(float).
//
// `rows` addresses T * C values per image: in(i) reads a logit, get/put read and write the same storage.
// `p` holds T * C values, `q` holds C (multiclass) or 2 C (multilabel).

template <class M>
TSYND_HD typename M::V log_mean(typename M::V mean) {
  return M::log(M::max(mean, M::splat(kMeanFloor)));
}

// log(mean_t exp(logp_t)) without underflow; `logp(t)` gives a value per image.
template <class M, class LogP>
TSYND_HD typename M::V shifted_log_mean(const LogP& logp, int64_t samples, typename M::V log_samples) {
  typename M::V top = logp(0);
  for (int64_t t = 1; t < samples; ++t) top = M::max(top, logp(t));
  typename M::V sum = M::splat(0.f);
  for (int64_t t = 0; t < samples; ++t) sum = sum + M::exp(logp(t) - top);
  return top + M::log(sum) - log_samples;
}

template <class M, class Rows>
TSYND_HD typename M::V multiclass_uncertainty(Rows& rows, typename M::V* p, typename M::V* q, int64_t samples,
                                              int64_t classes, Objective objective) {
  using V = typename M::V;
  const V zero = M::splat(0.f), floor = M::splat(kLogFloor);
  for (int64_t c = 0; c < classes; ++c) q[c] = zero;
  for (int64_t t = 0; t < samples; ++t) {
    const int64_t base = t * classes;
    V top = rows.in(base);
    for (int64_t c = 1; c < classes; ++c) top = M::max(top, rows.in(base + c));
    V sum = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const V shifted = M::max(rows.in(base + c) - top, floor);
      const V e = M::exp(shifted);
      p[base + c] = e;
      rows.put(base + c, shifted);
      sum = sum + e;
    }
    const V inverse = M::splat(1.f) / sum, log_sum = M::log(sum);
    for (int64_t c = 0; c < classes; ++c) {
      const V probability = p[base + c] * inverse;
      p[base + c] = probability;
      q[c] = q[c] + probability;
      rows.put(base + c, rows.get(base + c) - log_sum);
    }
  }
  const V inverse_samples = M::splat(1.f / static_cast<float>(samples));
  const V log_samples = M::log(M::splat(static_cast<float>(samples)));
  for (int64_t c = 0; c < classes; ++c) {
    const V mean = q[c] * inverse_samples;
    V log_q = log_mean<M>(mean);
    const auto tiny = M::less(mean, M::splat(kMeanFloor));
    if (M::any(tiny)) {
      const auto logp = [&](int64_t t) { return rows.get(t * classes + c); };
      log_q = M::select(tiny, shifted_log_mean<M>(logp, samples, log_samples), log_q);
    }
    q[c] = log_q;
  }
  const bool entropy = objective == Objective::kEntropy;
  V value = zero;
  for (int64_t t = 0; t < samples; ++t) {
    const int64_t base = t * classes;
    V inner = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const V r = entropy ? zero - q[c] : rows.get(base + c) - q[c];
      rows.put(base + c, r);
      inner = inner + p[base + c] * r;
    }
    value = value + inner;
    for (int64_t c = 0; c < classes; ++c)
      rows.put(base + c, p[base + c] * (rows.get(base + c) - inner) * inverse_samples);
  }
  return M::max(value * inverse_samples, zero);
}

// One label's Bernoulli: probabilities of 1 and 0 and their logarithms, exact at both ends.
template <class M>
struct Bernoulli {
  typename M::V p1, p0, log1, log0;
};

template <class M>
TSYND_HD Bernoulli<M> bernoulli(typename M::V logit) {
  using V = typename M::V;
  const V zero = M::splat(0.f), one = M::splat(1.f);
  const V x = M::max(M::select(M::less(M::splat(-kLogFloor), logit), M::splat(-kLogFloor), logit),
                     M::splat(kLogFloor));
  const auto negative = M::less(x, zero);
  const V low = M::select(negative, x, zero - x);  // -|x|
  const V e = M::exp(low);
  const V inverse = one / (one + e), log_sum = M::log(one + e);
  const V large = inverse, small = e * inverse;
  Bernoulli<M> out;
  out.p1 = M::select(negative, small, large);
  out.p0 = M::select(negative, large, small);
  out.log1 = M::select(negative, low, zero) - log_sum;
  out.log0 = M::select(negative, zero, low) - log_sum;
  return out;
}

// Sum over the labels of each label's binary uncertainty.
template <class M, class Rows>
TSYND_HD typename M::V multilabel_uncertainty(Rows& rows, typename M::V* q, int64_t samples, int64_t classes,
                                              Objective objective) {
  using V = typename M::V;
  const V zero = M::splat(0.f);
  for (int64_t c = 0; c < 2 * classes; ++c) q[c] = zero;
  for (int64_t t = 0; t < samples; ++t)
    for (int64_t c = 0; c < classes; ++c) {
      const V logit = rows.in(t * classes + c);
      rows.put(t * classes + c, logit);
      const Bernoulli<M> b = bernoulli<M>(logit);
      q[2 * c] = q[2 * c] + b.p1;
      q[2 * c + 1] = q[2 * c + 1] + b.p0;
    }
  const V inverse_samples = M::splat(1.f / static_cast<float>(samples));
  const V log_samples = M::log(M::splat(static_cast<float>(samples)));
  for (int64_t c = 0; c < 2 * classes; ++c) {
    const V mean = q[c] * inverse_samples;
    V log_q = log_mean<M>(mean);
    const auto tiny = M::less(mean, M::splat(kMeanFloor));
    if (M::any(tiny)) {
      const bool second = c % 2 != 0;
      const auto logp = [&](int64_t t) {
        const Bernoulli<M> b = bernoulli<M>(rows.get(t * classes + c / 2));
        return second ? b.log0 : b.log1;
      };
      log_q = M::select(tiny, shifted_log_mean<M>(logp, samples, log_samples), log_q);
    }
    q[c] = log_q;
  }
  const bool entropy = objective == Objective::kEntropy;
  V value = zero;
  for (int64_t t = 0; t < samples; ++t)
    for (int64_t c = 0; c < classes; ++c) {
      const Bernoulli<M> b = bernoulli<M>(rows.get(t * classes + c));
      const V r1 = (entropy ? zero : b.log1) - q[2 * c];
      const V r0 = (entropy ? zero : b.log0) - q[2 * c + 1];
      value = value + b.p1 * r1 + b.p0 * r0;
      rows.put(t * classes + c, b.p1 * b.p0 * (r1 - r0) * inverse_samples);
    }
  return M::max(value * inverse_samples, zero);
}

}  // namespace tsynd
