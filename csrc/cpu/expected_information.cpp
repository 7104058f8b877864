#include <tuple>

#include "common.h"

namespace tsynd {
namespace {

// Columns of the joint distributions worked on at once, and values of them that should stay in a core's L2
// between the two products.
constexpr int64_t kColumns = 1024, kJointInCache = 128 * 1024;

// A set of images' (or targets') posterior samples as the products want them; see RatiosTile.
struct Ratios {
  Ratios(int64_t samples, int64_t images, int64_t groups, int64_t outcomes, bool with_p)
      : columns(images * outcomes),
        ratio(groups * samples * columns),
        mean(groups * columns),
        p(with_p ? groups * samples * columns : 1) {}
  int64_t columns;
  Scratch ratio, mean, p;
};

// As RatiosTile says, for `count` images from `first` of [samples, all, classes].
void find_ratios(const Kernels& k, const float* logits, int64_t first, int64_t count, int64_t all,
                 int64_t samples, int64_t classes, Task task, bool with_p, float* scratch,
                 const Ratios& out) {
  const int64_t outcomes = task == Task::kMulticlass ? classes : 2;
  for (int64_t image = 0; image < count; image += k.lanes)
    k.ratios({logits + (first + image) * classes, all * classes, std::min<int64_t>(k.lanes, count - image),
              samples, classes, task, out.ratio.get() + image * outcomes, out.mean.get() + image * outcomes,
              with_p ? out.p.get() + image * outcomes : nullptr, count * outcomes, scratch});
}

// With a = p / pbar - 1 of the images and b = q / qbar - 1 of the targets, the joint distribution of an
// image's label c and a target's label k is pbar_c qbar_k (1 + d), d = mean_t a_tc b_tk: one product for d,
// one sweep that turns d into log(1 + d) and sums, one product for the gradient. A multilabel task does this
// for every label by itself.
std::tuple<Tensor, Tensor> expected_information(const Tensor& logits_in, const Tensor& targets_in,
                                                const std::string& task) {
  const Task kind = parse_task(task);
  check_targets(logits_in, targets_in);
  const int64_t samples = logits_in.size(0), images = logits_in.size(1), classes = logits_in.size(2),
                count = targets_in.size(1);
  const int64_t groups = kind == Task::kMulticlass ? 1 : classes,
                outcomes = kind == Task::kMulticlass ? classes : 2;
  const Tensor logits = as_float(logits_in), targets = as_float(targets_in);
  Tensor value = new_values(logits, images);
  Tensor gradient = torch::stable::empty_like(logits);
  const bool narrow_type = logits_in.scalar_type() != ScalarType::Float;
  const auto result = [&] {
    return std::tuple(value, narrow_type ? torch::stable::to(gradient, logits_in.scalar_type()) : gradient);
  };
  if (images == 0) return result();

  const Kernels& k = kernels();
  const float* const from = static_cast<const float*>(logits.const_data_ptr());
  float* const to = static_cast<float*>(gradient.mutable_data_ptr());
  float* const values = static_cast<float*>(value.mutable_data_ptr());
  const int64_t columns = count * outcomes;
  const Ratios target(samples, count, groups, outcomes, false);
  const Scratch weighted(groups * samples * columns);  // qbar b
  {
    const Scratch scratch(ratios_scratch(samples, classes));
    find_ratios(k, static_cast<const float*>(targets.const_data_ptr()), 0, count, count, samples, classes,
                kind, false, scratch.get(), target);
    for (int64_t row = 0; row < groups * samples; ++row)
      for (int64_t j = 0; j < columns; ++j)
        weighted.get()[row * columns + j] =
            target.mean.get()[row / samples * columns + j] * target.ratio.get()[row * columns + j];
  }

  const int64_t width = std::min(columns, kColumns), threads = torch::stable::get_num_threads();
  int64_t tile = std::clamp<int64_t>(kJointInCache / (width * outcomes), 1, 256);
  tile = std::min(tile, (images + threads - 1) / threads);
  if (tile > k.lanes) tile = tile / k.lanes * k.lanes;
  const float inverse = 1.f / static_cast<float>(samples);
  const double share = 1. / static_cast<double>(count);
  torch::stable::parallel_for(0, (images + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = tile * outcomes;  // rows
    const Ratios own(samples, tile, groups, outcomes, true);
    const Scratch joint(most * width), slope(samples * most), more(samples * most),
        scratch(ratios_scratch(samples, classes));
    const Scratch excess(most), gained(most);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * tile, here = std::min(tile, images - first), rows = here * outcomes;
      find_ratios(k, from, first, here, images, samples, classes, kind, true, scratch.get(), own);
      std::fill(values + first, values + first + here, 0.f);
      for (int64_t g = 0; g < groups; ++g) {
        std::fill(excess.get(), excess.get() + rows, 0.f);
        std::fill(gained.get(), gained.get() + rows, 0.f);
        for (int64_t at = 0; at < columns; at += width) {
          const int64_t some = std::min(width, columns - at);
          multiply({joint.get(), rows, some, some},
                   {own.ratio.get() + g * samples * rows, samples, rows, rows, true},
                   {target.ratio.get() + g * samples * columns + at, samples, some, columns});
          k.information({joint.get(), rows, some, inverse, target.mean.get() + g * columns + at, excess.get(),
                         gained.get()});
          float* const part = at == 0 ? slope.get() : more.get();
          multiply({part, samples, rows, rows},
                   {weighted.get() + g * samples * columns + at, samples, some, columns},
                   {joint.get(), rows, some, some, true});
          if (at > 0)
            for (int64_t i = 0; i < samples * rows; ++i) slope.get()[i] += part[i];
        }
        const float* const mean = own.mean.get() + g * rows;
        for (int64_t image = 0; image < here; ++image) {
          double sum = 0.;
          for (int64_t i = image * outcomes; i < (image + 1) * outcomes; ++i)
            sum += static_cast<double>(mean[i]) * gained.get()[i];
          values[first + image] += static_cast<float>(sum * share);
        }
        const float scale = static_cast<float>(share) * inverse;
        for (int64_t t = 0; t < samples; ++t)
          for (int64_t image = 0; image < here; ++image) {
            const float* const s = slope.get() + t * rows + image * outcomes;
            const float* const e = excess.get() + image * outcomes;
            const float* const p = own.p.get() + (g * samples + t) * rows + image * outcomes;
            float* const out = to + (t * images + first + image) * classes + g;
            if (kind == Task::kMultilabel) {
              *out = p[0] * p[1] * ((s[0] + e[0]) - (s[1] + e[1])) * scale;
              continue;
            }
            float inner = 0.f;
            for (int64_t c = 0; c < classes; ++c) inner += p[c] * (s[c] + e[c]);
            for (int64_t c = 0; c < classes; ++c) out[c] = p[c] * (s[c] + e[c] - inner) * scale;
          }
      }
    }
  });
  return result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsynd, CPU, m) { m.impl("expected_information", TORCH_BOX(&expected_information)); }

}  // namespace tsynd
