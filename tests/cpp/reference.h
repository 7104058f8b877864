// The formulas in double precision, written for reading, and the bounds that results are held to.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace check {

inline int failures = 0, checks = 0;

inline void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

struct Row {
  double value;
  std::vector<double> gradient;  // [T][C]
};

// Value and d value / d logits of logits [T][C]: r = log p - log pbar, or -log pbar.
inline Row uncertainty(const std::vector<double>& logits, int samples, int classes, bool entropy,
                       bool multilabel) {
  Row out{0., std::vector<double>(logits.size())};
  const int groups = multilabel ? classes : 1, outcomes = multilabel ? 2 : classes;
  for (int group = 0; group < groups; ++group) {
    std::vector<double> logp(static_cast<size_t>(samples) * outcomes), mean(outcomes, 0.);
    for (int t = 0; t < samples; ++t) {
      const auto at = [&](int k) {
        const double x = logits[t * classes + (multilabel ? group : k)];
        return multilabel ? (k == 0 ? x : 0.) : x;
      };
      double top = at(0), sum = 0.;
      for (int k = 1; k < outcomes; ++k) top = std::fmax(top, at(k));
      for (int k = 0; k < outcomes; ++k) sum += std::exp(at(k) - top);
      for (int k = 0; k < outcomes; ++k) logp[t * outcomes + k] = at(k) - top - std::log(sum);
    }
    for (int k = 0; k < outcomes; ++k) {
      double top = logp[k], sum = 0.;
      for (int t = 1; t < samples; ++t) top = std::fmax(top, logp[t * outcomes + k]);
      for (int t = 0; t < samples; ++t) sum += std::exp(logp[t * outcomes + k] - top);
      mean[k] = top + std::log(sum / samples);
    }
    for (int t = 0; t < samples; ++t) {
      double inner = 0.;
      std::vector<double> p(outcomes), r(outcomes);
      for (int k = 0; k < outcomes; ++k) {
        const double l = logp[t * outcomes + k];
        p[k] = std::exp(l);
        r[k] = p[k] == 0. ? 0. : (entropy ? 0. : l) - mean[k];
        inner += p[k] * r[k];
      }
      out.value += inner / samples;
      if (multilabel)
        out.gradient[t * classes + group] = p[0] * (r[0] - inner) / samples;
      else
        for (int k = 0; k < outcomes; ++k) out.gradient[t * classes + k] = p[k] * (r[k] - inner) / samples;
    }
  }
  out.value = std::fmax(out.value, 0.);
  return out;
}

// Expected information about one target, and its derivative by the image's logits: J = mean_t p_t q_t^T in
// long double, sum_ck J log(J / (pbar qbar^T)) pair by pair.
inline Row information(const std::vector<double>& logits, const std::vector<double>& target, int samples,
                       int classes, bool multilabel) {
  using Wide = long double;
  Row out{0., std::vector<double>(logits.size())};
  const int groups = multilabel ? classes : 1, outcomes = multilabel ? 2 : classes;
  Wide value = 0;
  for (int group = 0; group < groups; ++group) {
    const auto probabilities = [&](const std::vector<double>& x) {
      std::vector<Wide> p(static_cast<size_t>(samples) * outcomes);
      for (int t = 0; t < samples; ++t) {
        Wide sum = 0;
        for (int k = 0; k < outcomes; ++k) {
          const Wide at = multilabel ? (k == 0 ? x[t * classes + group] : 0.) : x[t * classes + k];
          sum += p[t * outcomes + k] = std::exp(at);
        }
        for (int k = 0; k < outcomes; ++k) p[t * outcomes + k] /= sum;
      }
      return p;
    };
    const std::vector<Wide> p = probabilities(logits), q = probabilities(target);
    std::vector<Wide> slope(static_cast<size_t>(samples) * outcomes, 0);
    for (int c = 0; c < outcomes; ++c)
      for (int k = 0; k < outcomes; ++k) {
        Wide joint = 0, p_mean = 0, q_mean = 0;
        for (int t = 0; t < samples; ++t) {
          joint += p[t * outcomes + c] * q[t * outcomes + k] / samples;
          p_mean += p[t * outcomes + c] / samples;
          q_mean += q[t * outcomes + k] / samples;
        }
        const Wide ratio = std::log(joint / (p_mean * q_mean));
        value += joint * ratio;
        for (int t = 0; t < samples; ++t) slope[t * outcomes + c] += q[t * outcomes + k] * ratio / samples;
      }
    for (int t = 0; t < samples; ++t) {
      Wide inner = 0;
      for (int c = 0; c < outcomes; ++c) inner += p[t * outcomes + c] * slope[t * outcomes + c];
      for (int c = 0; c < (multilabel ? 1 : outcomes); ++c)
        out.gradient[t * classes + (multilabel ? group : c)] =
            static_cast<double>(p[t * outcomes + c] * (slope[t * outcomes + c] - inner));
    }
  }
  out.value = static_cast<double>(value);
  return out;
}

// Largest |actual - exact| must be within `relative` of the largest |exact|, or `absolute`.
template <class Actual>
void expect_close(const std::vector<Actual>& actual, const std::vector<double>& exact, double relative,
                  double absolute, const std::string& what) {
  if (actual.size() != exact.size()) return expect(false, what + ": sizes differ");
  double largest = 0., gap = 0.;
  size_t worst = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    largest = std::fmax(largest, std::fabs(exact[i]));
    const double here = std::fabs(static_cast<double>(actual[i]) - exact[i]);
    if (!(here <= gap)) gap = here, worst = i;  // also catches NaN
  }
  const bool holds = gap <= std::fmax(relative * largest, absolute);
  char told[96];
  std::snprintf(told, sizeof(told), ": off by %.3g at %zu of %zu, largest entry %.3g", gap, worst,
                exact.size(), largest);
  expect(holds, what + told);
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double normal(double scale = 1.) { return std::normal_distribution<double>(0., scale)(engine_); }
  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace check
