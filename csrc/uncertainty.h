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

// A confident classifier's uncertainty lives in the last digits of probabilities near 1, and the ascent
// normalises its gradient. So log-probabilities and their means go through log1p and expm1, which keep r
// accurate relative to its own size, not to 1: a gradient of 1e-9 is still a direction and not rounding
// noise.
//
// A Math policy M gives: V (a value per image), exp and expm1 (arguments <= 0), log1p (above -1), max(a, b)
// returning a when a is NaN, select(mask, a, b), less(a, b), splat(float).
//
// `rows` addresses T * C values per image: in(i) reads a logit, get/put read and write the same storage.
// `p` holds T * C values, `q` holds C (multiclass) or 2 C (multilabel).

// log(mean_t exp(logp(t))), shifted by the largest: nothing underflows, and where all samples agree the
// result is exactly their log-probability, so the mutual information is exactly 0.
template <class M, class LogP>
TSYND_HD typename M::V log_mean(const LogP& logp, int64_t samples) {
  typename M::V top = logp(0);
  for (int64_t t = 1; t < samples; ++t) top = M::max(top, logp(t));
  // four sums: one long sum of near-equal terms drifts, and waits for itself
  typename M::V sums[4] = {M::splat(0.f), M::splat(0.f), M::splat(0.f), M::splat(0.f)};
  int64_t t = 0;
  for (; t + 4 <= samples; t += 4)
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] + M::expm1(logp(t + i) - top);
  for (int i = 0; t < samples; ++t, ++i) sums[i] = sums[i] + M::expm1(logp(t) - top);
  const typename M::V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return top + M::log1p(sum * M::splat(1.f / static_cast<float>(samples)));
}

// Of a joint probability pbar qbar (1 + d): log(1 + d), and log(1 + d) - d by its series near 0, where the
// difference would keep no digits. d is kept above -1, below which only rounding takes it.
template <class M>
struct JointRatio {
  typename M::V d, log, excess;
};

template <class M>
TSYND_HD JointRatio<M> joint_ratio(typename M::V d_in) {
  using V = typename M::V;
  const V d = M::max(d_in, M::splat(-1.f + 5.9604645e-8f));
  // 1/2 .. 1/10 of (-d)^n / n: 4e-8 of the result at 1/8
  V series = M::splat(-1.f / 10.f);
  series = series * d + M::splat(1.f / 9.f);
  series = series * d + M::splat(-1.f / 8.f);
  series = series * d + M::splat(1.f / 7.f);
  series = series * d + M::splat(-1.f / 6.f);
  series = series * d + M::splat(1.f / 5.f);
  series = series * d + M::splat(-1.f / 4.f);
  series = series * d + M::splat(1.f / 3.f);
  series = series * d + M::splat(-1.f / 2.f);
  const V log = M::log1p(d), size = M::max(d, M::splat(0.f) - d);
  return JointRatio<M>{d, log, M::select(M::less(size, M::splat(0.125f)), series * d * d, log - d)};
}

// Compensated (Kahan) sum: the passes' terms largely cancel in the mutual information.
template <class M>
struct Sum {
  typename M::V total, lost;
};

template <class M>
TSYND_HD void add(Sum<M>& sum, typename M::V x) {
  const typename M::V y = x - sum.lost, total = sum.total + y;
  sum.lost = (total - sum.total) - y;
  sum.total = total;
}

// Logits [classes] from `base` on become log-probabilities, and `p` their probabilities.
template <class M, class Rows>
TSYND_HD void log_softmax(Rows& rows, int64_t base, typename M::V* p, int64_t classes) {
  using V = typename M::V;
  const V zero = M::splat(0.f), one = M::splat(1.f), floor = M::splat(kLogFloor);
  V top = rows.in(base);
  for (int64_t c = 1; c < classes; ++c) top = M::max(top, rows.in(base + c));
  V rest = zero,
    ties = zero;  // the sum of exponentials is ties + rest, ties being those equal to the largest
  for (int64_t c = 0; c < classes; ++c) {
    const V shifted = M::max(rows.in(base + c) - top, floor);
    const V e = M::exp(shifted);
    const auto below = M::less(shifted, zero);
    p[c] = e;
    rows.put(base + c, shifted);
    rest = rest + M::select(below, e, zero);
    ties = ties + M::select(below, zero, one);
  }
  const V inverse = one / (rest + ties), log_sum = M::log1p(rest + (ties - one));
  for (int64_t c = 0; c < classes; ++c) {
    p[c] = p[c] * inverse;
    rows.put(base + c, rows.get(base + c) - log_sum);
  }
}

template <class M, class Rows>
TSYND_HD typename M::V multiclass_uncertainty(Rows& rows, typename M::V* p, typename M::V* q, int64_t samples,
                                              int64_t classes, Objective objective) {
  using V = typename M::V;
  const V zero = M::splat(0.f);
  for (int64_t t = 0; t < samples; ++t) log_softmax<M>(rows, t * classes, p + t * classes, classes);
  for (int64_t c = 0; c < classes; ++c)
    q[c] = log_mean<M>([&](int64_t t) { return rows.get(t * classes + c); }, samples);
  const V inverse_samples = M::splat(1.f / static_cast<float>(samples));
  const bool entropy = objective == Objective::kEntropy;
  Sum<M> value{zero, zero};
  for (int64_t t = 0; t < samples; ++t) {
    const int64_t base = t * classes;
    V inner = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const V r = entropy ? zero - q[c] : rows.get(base + c) - q[c];
      rows.put(base + c, r);
      inner = inner + p[base + c] * r;
    }
    add<M>(value, inner);
    for (int64_t c = 0; c < classes; ++c)
      rows.put(base + c, p[base + c] * (rows.get(base + c) - inner) * inverse_samples);
  }
  return M::max(value.total * inverse_samples, zero);
}

// Log-probabilities of one label's 1 and 0, exact at both ends.
template <class M>
struct Bernoulli {
  typename M::V log1, log0;
};

template <class M>
TSYND_HD Bernoulli<M> bernoulli(typename M::V logit) {
  using V = typename M::V;
  const V zero = M::splat(0.f);
  const V x = M::max(M::select(M::less(M::splat(-kLogFloor), logit), M::splat(-kLogFloor), logit),
                     M::splat(kLogFloor));
  const auto negative = M::less(x, zero);
  const V low = M::select(negative, x, zero - x);  // -|x|
  const V log_sum = M::log1p(M::exp(low));
  Bernoulli<M> out;
  out.log1 = M::select(negative, low, zero) - log_sum;
  out.log0 = M::select(negative, zero, low) - log_sum;
  return out;
}

// Sum over the labels of each label's binary uncertainty.
template <class M, class Rows>
TSYND_HD typename M::V multilabel_uncertainty(Rows& rows, typename M::V* log0, typename M::V* q,
                                              int64_t samples, int64_t classes, Objective objective) {
  using V = typename M::V;
  const V zero = M::splat(0.f);
  for (int64_t i = 0; i < samples * classes; ++i) {
    const Bernoulli<M> b = bernoulli<M>(rows.in(i));
    rows.put(i, b.log1);
    log0[i] = b.log0;
  }
  for (int64_t c = 0; c < classes; ++c) {
    q[2 * c] = log_mean<M>([&](int64_t t) { return rows.get(t * classes + c); }, samples);
    q[2 * c + 1] = log_mean<M>([&](int64_t t) { return log0[t * classes + c]; }, samples);
  }
  const V inverse_samples = M::splat(1.f / static_cast<float>(samples));
  const bool entropy = objective == Objective::kEntropy;
  Sum<M> value{zero, zero};
  for (int64_t t = 0; t < samples; ++t) {
    V inner = zero;  // a sum per pass first: one long sum of near-equal terms drifts
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t i = t * classes + c;
      const V log1 = rows.get(i), p1 = M::exp(log1), p0 = M::exp(log0[i]);
      const V r1 = (entropy ? zero : log1) - q[2 * c], r0 = (entropy ? zero : log0[i]) - q[2 * c + 1];
      inner = inner + (p1 * r1 + p0 * r0);
      rows.put(i, p1 * p0 * (r1 - r0) * inverse_samples);
    }
    add<M>(value, inner);
  }
  return M::max(value.total * inverse_samples, zero);
}

}  // namespace tsynd
