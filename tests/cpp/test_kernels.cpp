// The CUDA kernels' own code, run on the host thread by thread (emulator.h), against double precision.
#include <map>

#include "../../csrc/cuda/ascend.cuh"
#include "../../csrc/cuda/dropout_head.cuh"
#include "../../csrc/cuda/dropout_mask.cuh"
#include "../../csrc/cuda/expected_information.cuh"
#include "../../csrc/cuda/head_mma.cuh"
#include "../../csrc/cuda/rows.cuh"
#include "../../csrc/cuda/wgmma_head.cuh"
#include "reference.h"

namespace {

using namespace tsynd;
using check::expect;
using check::expect_close;
using check::Random;

constexpr DeviceLimits kLarge{227 * 1024, 132, 90}, kSmall{99 * 1024, 1, 80};

// Aligned device memory whose surroundings are watched.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count), bytes_(count * sizeof(T) + 2 * kGuard) {
    data_ = static_cast<unsigned char*>(std::aligned_alloc(kGuard, (bytes_ + kGuard - 1) / kGuard * kGuard));
    std::memset(data_, 0xFF, bytes_);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    for (size_t i = 0; i < kGuard; ++i)
      expect(data_[i] == 0xFF && data_[kGuard + count_ * sizeof(T) + i] == 0xFF, "a write outside a tensor");
    std::free(data_);
  }
  T* get() { return reinterpret_cast<T*>(data_ + kGuard); }
  T& operator[](size_t i) { return get()[i]; }
  size_t size() const { return count_; }
  void fill(Random& random, double scale) {
    for (size_t i = 0; i < count_; ++i) get()[i] = from_float<T>(static_cast<float>(random.normal(scale)));
  }
  std::vector<double> values() {
    std::vector<double> out(count_);
    for (size_t i = 0; i < count_; ++i) out[i] = to_float(get()[i]);
    return out;
  }

 private:
  static constexpr size_t kGuard = 64;
  size_t count_, bytes_;
  unsigned char* data_;
};

// One rounding of a result, and the rounding of the slopes that a product is made of.
template <class T>
constexpr double kRounding = std::is_same_v<T, float>  ? 1e-5
                             : std::is_same_v<T, Half> ? 1. / 1024
                                                       : 1. / 128;

template <class T>
const char* name_of() {
  return std::is_same_v<T, float> ? "float32" : std::is_same_v<T, Half> ? "float16" : "bfloat16";
}

std::map<std::string, int> used;  // which kernels the plans chose

template <class T>
void rows(int images, int samples, int classes, bool pass_major, bool with_bias, bool entropy,
          bool multilabel, const DeviceLimits& limits, unsigned seed) {
  Random random(seed);
  Buffer<T> logits(static_cast<size_t>(images) * samples * classes), bias(samples * classes);
  Buffer<float> value(images);
  logits.fill(random, 3.);
  bias.fill(random, 1.);
  RowLayout layout{};
  layout.images = images;
  layout.image_stride = pass_major ? classes : static_cast<int64_t>(samples) * classes;
  layout.pass_stride = pass_major ? static_cast<int64_t>(images) * classes : classes;
  layout.bias_stride = classes;
  layout.row = {samples, classes, entropy, multilabel};
  std::vector<double> values, gradients(logits.size());
  for (int b = 0; b < images; ++b) {
    std::vector<double> row;
    for (int t = 0; t < samples; ++t)
      for (int c = 0; c < classes; ++c)
        row.push_back(to_float(logits[b * layout.image_stride + t * layout.pass_stride + c]) +
                      (with_bias ? to_float(bias[t * classes + c]) : 0.));
    const check::Row exact = check::uncertainty(row, samples, classes, entropy, multilabel);
    values.push_back(exact.value);
    for (int t = 0; t < samples; ++t)
      for (int c = 0; c < classes; ++c)
        gradients[b * layout.image_stride + t * layout.pass_stride + c] = exact.gradient[t * classes + c];
  }
  const RowPlan plan = plan_rows(samples, classes, multilabel, limits);
  ++used["rows " + std::to_string(plan.kind)];
  run_rows<T>(seed, logits.get(), logits.get(), with_bias ? bias.get() : nullptr, value.get(), layout,
              limits);
  const std::string what = std::string("rows ") + name_of<T>() + " [" + std::to_string(images) + ", " +
                           std::to_string(samples) + ", " + std::to_string(classes) + "] kind " +
                           std::to_string(plan.kind) + (entropy ? " entropy" : "") +
                           (multilabel ? " multilabel" : "");
  expect_close(value.values(), values, 1e-5, 5e-7, what + " value");
  expect_close(logits.values(), gradients, kRounding<T>, 5e-7, what + " gradient");
}

// d value / d features through slopes rounded to T, and the size of the terms it sums.
struct Head {
  std::vector<double> values, gradient, terms;
};

template <class T, class Weight>
Head exact_head(int images, int units, int samples, int classes, bool entropy, bool multilabel,
                const T& feature, const Weight& weight, const std::function<double(int, int)>& bias) {
  Head out;
  for (int b = 0; b < images; ++b) {
    std::vector<double> row(static_cast<size_t>(samples) * classes);
    for (int t = 0; t < samples; ++t)
      for (int c = 0; c < classes; ++c) {
        double sum = bias(t, c);
        for (int d = 0; d < units; ++d) sum += feature(b, d) * weight(b, t, c, d);
        row[t * classes + c] = sum;
      }
    const check::Row exact = check::uncertainty(row, samples, classes, entropy, multilabel);
    out.values.push_back(exact.value);
    for (int d = 0; d < units; ++d) {
      double sum = 0., size = 0.;
      for (int t = 0; t < samples; ++t)
        for (int c = 0; c < classes; ++c) {
          const double term = exact.gradient[t * classes + c] * weight(b, t, c, d);
          sum += term;
          size += std::fabs(term);
        }
      out.gradient.push_back(sum);
      out.terms.push_back(size);
    }
  }
  return out;
}

double largest(const std::vector<double>& x) {
  double out = 0.;
  for (const double v : x) out = std::fmax(out, std::fabs(v));
  return out;
}

template <class T>
void fused(int images, int units, int samples, int classes, bool with_bias, bool entropy,
           const DeviceLimits& limits, HeadPlan::Kind kernel, unsigned seed) {
  Random random(seed);
  Buffer<T> features(static_cast<size_t>(images) * units),
      weight(static_cast<size_t>(samples) * classes * units), bias(samples * classes),
      gradient(static_cast<size_t>(images) * units);
  Buffer<float> value(images);
  features.fill(random, 1.);
  weight.fill(random, 2. / std::sqrt(units));
  bias.fill(random, 1.);
  const HeadPlan plan = plan_head(images, units, classes, samples, false, true, true, limits, kernel);
  const std::string name = kernel == HeadPlan::kWgmma ? "wgmma " : "fused ";
  const std::string what = name + name_of<T>() + " B " + std::to_string(images) + " D " +
                           std::to_string(units) + " C " + std::to_string(classes) + " T " +
                           std::to_string(samples) + (entropy ? " entropy" : "");
  if (plan.kind != kernel) return expect(false, what + ": the plan is another");
  ++used[name + std::to_string(plan.columns) + " columns, " + std::to_string(plan.classes) + " classes, " +
         std::to_string(plan.images) + " images, " + std::to_string(plan.stages) + " stages, clusters of " +
         std::to_string(plan.cluster)];
  const RowTask row{samples, classes, entropy, false};
  const T* const b = with_bias ? bias.get() : nullptr;
  if (kernel == HeadPlan::kWgmma)
    run_wgmma_head<T>(seed, features.get(), weight.get(), b, gradient.get(), value.get(), images, units, row,
                      plan);
  else
    run_fused_head<T>(seed, features.get(), weight.get(), b, gradient.get(), value.get(), images, units, row,
                      plan);
  const Head exact = exact_head(
      images, units, samples, classes, entropy, false,
      [&](int b, int d) { return static_cast<double>(to_float(features[b * units + d])); },
      [&](int, int t, int c, int d) {
        return static_cast<double>(to_float(weight[(t * classes + c) * units + d]));
      },
      [&](int t, int c) { return with_bias ? static_cast<double>(to_float(bias[t * classes + c])) : 0.; });
  expect_close(value.values(), exact.values, 2e-5, 1e-6, what + " value");
  expect_close(gradient.values(), exact.gradient, kRounding<T>, kRounding<T> / 2 * largest(exact.terms),
               what + " gradient");
}

bool kept_at(int64_t seed, int64_t layer, int64_t id, int pass, int unit, uint32_t keep) {
  return (mask_block(mask_address(seed, layer, id), static_cast<uint32_t>(unit / 16),
                     static_cast<uint32_t>(pass), keep) >>
          (unit % 16)) &
         1u;
}

template <class T>
void dropout_head(int images, int units, int samples, int classes, uint32_t keep, bool with_bias,
                  bool entropy, bool multilabel, unsigned seed) {
  Random random(seed);
  Buffer<T> features(static_cast<size_t>(images) * units), weight(static_cast<size_t>(classes) * units),
      bias(classes), gradient(static_cast<size_t>(images) * units);
  Buffer<float> value(images);
  Buffer<int64_t> ids(images);
  features.fill(random, 1.);
  weight.fill(random, 2. / std::sqrt(units));
  bias.fill(random, 1.);
  for (int b = 0; b < images; ++b) ids[b] = random.integer(0, 0xFFFFFFFFll);
  const int64_t key = random.integer(INT64_MIN, INT64_MAX), layer = random.integer(0, 0xFFFFFFFFll);
  const DropoutHeadPlan plan = plan_dropout_head(units, classes, samples, !std::is_same_v<T, float>, kLarge);
  const std::string what = std::string("dropout head ") + name_of<T>() + " B " + std::to_string(images) +
                           " D " + std::to_string(units) + " C " + std::to_string(classes) + " T " +
                           std::to_string(samples) + " keep " + std::to_string(keep) +
                           (entropy ? " entropy" : "") + (multilabel ? " multilabel" : "");
  if (plan.kind == DropoutHeadPlan::kGeneral) return expect(false, what + ": the plan is general");
  ++used[std::string("dropout head ") + (plan.kind == DropoutHeadPlan::kTensor ? "tensor" : "direct") + ", " +
         std::to_string(plan.classes) + " classes, " + std::to_string(plan.warps) + " warps"];
  const MaskAddress at = mask_address(key, layer, 0);
  const float scale = 256.f / static_cast<float>(keep);
  const DropoutHead job{images,
                        units,
                        0,
                        {samples, classes, entropy, multilabel},
                        {at.key0, at.key1, at.layer, keep_test(keep)},
                        scale,
                        0};
  run_dropout_head<T>(seed, features.get(), weight.get(), with_bias ? bias.get() : nullptr, ids.get(),
                      gradient.get(), value.get(), job, plan);
  const Head exact = exact_head(
      images, units, samples, classes, entropy, multilabel,
      [&](int b, int d) { return static_cast<double>(to_float(features[b * units + d])); },
      [&](int b, int t, int c, int d) {
        return kept_at(key, layer, ids[b], t, d, keep)
                   ? scale * static_cast<double>(to_float(weight[c * units + d]))
                   : 0.;
      },
      [&](int, int c) { return with_bias ? static_cast<double>(to_float(bias[c])) : 0.; });
  expect_close(value.values(), exact.values, 2e-5, 1e-6, what + " value");
  const double own = std::is_same_v<T, float> ? 2e-6 : kRounding<T> / 2;
  expect_close(gradient.values(), exact.gradient, kRounding<T>, own * largest(exact.terms),
               what + " gradient");
}

void masks(int images, int64_t units, int samples, uint32_t keep, unsigned seed) {
  Random random(seed);
  Buffer<uint8_t> mask(static_cast<size_t>(images * units) * samples);
  Buffer<int64_t> ids(images);
  for (int b = 0; b < images; ++b) ids[b] = random.integer(0, 0xFFFFFFFFll);
  const MaskAddress at = mask_address(seed, 3, 0);
  const int64_t blocks = (units + 15) / 16, rows = static_cast<int64_t>(images) * samples;
  launch(seed, mask_bytes<uint8_t>, blocks_for(rows * blocks, kMaskThreads), kMaskThreads, 0, mask.get(),
         ids.get(), rows, static_cast<int64_t>(images), units,
         MaskStream{at.key0, at.key1, at.layer, keep_test(keep)});
  bool same = true;
  for (int t = 0; t < samples; ++t)
    for (int b = 0; b < images; ++b)
      for (int u = 0; u < units; ++u)
        same &=
            mask[(static_cast<size_t>(t) * images + b) * units + u] == kept_at(seed, 3, ids[b], t, u, keep);
  expect(same, "mask bits of " + std::to_string(units) + " units, keep " + std::to_string(keep));
}

template <class T>
void expansion(int images, int units, int inner, int samples, uint32_t keep, bool expanded, bool shared,
               unsigned seed) {
  Random random(seed);
  const size_t size = static_cast<size_t>(units) * inner, small = images * size * (expanded ? samples : 1);
  Buffer<T> input(small), out(images * size * samples), gradient(images * size * samples), in(small);
  Buffer<float> sum(small);
  Buffer<int64_t> ids(shared ? 1 : images);
  input.fill(random, 1.);
  gradient.fill(random, 1.);
  for (size_t i = 0; i < small; ++i) sum[i] = 1.f;
  for (size_t b = 0; b < ids.size(); ++b) ids[b] = random.integer(0, 0xFFFFFFFFll);
  const MaskAddress at = mask_address(seed, 9, 0);
  const float scale = 256.f / static_cast<float>(keep);
  const int first = 5;
  const Expansion job{images,  units,    inner,  first,
                      samples, expanded, shared, {at.key0, at.key1, at.layer, keep_test(keep)},
                      scale};
  run_expand<T>(seed, input.get(), out.get(), ids.get(), job);
  run_gather<T, T, false>(seed, gradient.get(), in.get(), ids.get(), job);
  run_gather<T, float, true>(seed, gradient.get(), sum.get(), ids.get(), job);
  std::vector<double> forward, backward(small, 0.);
  for (int t = 0; t < samples; ++t)
    for (int b = 0; b < images; ++b)
      for (size_t e = 0; e < size; ++e) {
        const size_t here = (static_cast<size_t>(t) * images + b) * size + e,
                     from = expanded ? here : b * size + e;
        const bool keep_it =
            kept_at(seed, 9, ids[shared ? 0 : b], first + t, static_cast<int>(e / inner), keep);
        forward.push_back(keep_it ? to_float(input[from]) * static_cast<double>(scale) : 0.);
        backward[from] += keep_it ? to_float(gradient[here]) * static_cast<double>(scale) : 0.;
      }
  const std::string what = std::string("expansion ") + name_of<T>() + " units " + std::to_string(units) +
                           " inner " + std::to_string(inner) + (expanded ? " expanded" : "") +
                           (shared ? " shared" : "");
  expect_close(out.values(), forward, kRounding<T> / 2, 0., what + " forward");
  expect_close(in.values(), backward, kRounding<T> / 2, 0., what + " backward");
  for (double& x : backward) x += 1.;
  expect_close(sum.values(), backward, 1e-6, 0., what + " accumulated");
}

template <class T>
void ascent(int images, int count, double size, float step, float radius, bool l2, unsigned seed) {
  Random random(seed);
  const size_t all = static_cast<size_t>(images) * count;
  Buffer<T> latents(all), gradient(all), origin(all);
  latents.fill(random, 1.);
  gradient.fill(random, size);
  for (size_t i = 0; i < all; ++i)
    origin[i] = from_float<T>(to_float(latents[i]) + static_cast<float>(random.normal(.1)));
  if (images > 1)
    for (int i = 0; i < count; ++i) gradient[i] = from_float<T>(0.f);  // the first image stays
  if (images > 2) gradient[2 * count - 1] = from_float<T>(NAN);        // and so does the second
  std::vector<double> wanted;
  for (int b = 0; b < images; ++b) {
    double norm = 0., length = 0.;
    for (int i = 0; i < count; ++i)
      norm += std::pow(static_cast<double>(to_float(gradient[b * count + i])), 2);
    const bool moves = norm > 0. && std::isfinite(norm);
    std::vector<double> offset(count);
    for (int i = 0; i < count; ++i) {
      const double g = to_float(gradient[b * count + i]), z = to_float(latents[b * count + i]),
                   z0 = to_float(origin[b * count + i]);
      offset[i] = z - z0 + step * (l2 ? g / std::sqrt(norm) : (g > 0) - (g < 0));
      length += offset[i] * offset[i];
    }
    length = std::sqrt(length);
    for (int i = 0; i < count; ++i) {
      const double z0 = to_float(origin[b * count + i]);
      const double inside =
          l2 ? offset[i] * std::fmin(1., radius / length) : std::fmax(-radius, std::fmin(radius, offset[i]));
      wanted.push_back(moves ? z0 + inside : to_float(latents[b * count + i]));
    }
  }
  run_ascend<T>(seed, latents.get(), gradient.get(), origin.get(),
                AscendStep{images, count, step, radius, l2, 0});
  expect_close(
      latents.values(), wanted, kRounding<T> / 2, 1e-6,
      std::string("ascend ") + name_of<T>() + " of " + std::to_string(count) + (l2 ? " l2" : " linf"));
}

template <class T>
void all_rows(unsigned seed) {
  const int shapes[][3] = {{5, 1, 1},   {9, 7, 2},   {3, 32, 8},  {33, 32, 8}, {4, 20, 3},
                           {2, 70, 16}, {3, 5, 32},  {2, 130, 8}, {2, 300, 2}, {3, 9, 40},
                           {2, 6, 129}, {1, 40, 33}, {4, 9, 12},  {8, 5, 24}};
  for (const auto& s : shapes)
    for (int options = 0; options < 4; ++options) {
      ++seed;
      rows<T>(s[0], s[1], s[2], seed % 2, seed % 3 == 0, options & 1, options & 2, kLarge, seed);
    }
  for (int options = 0; options < 4; ++options)  // more than shared memory holds
    rows<T>(2, 11, 50, options & 1, true, options & 1, options & 2, DeviceLimits{1024, 1}, ++seed);
}

// Many passes: sums are plain, and must still keep to the value.
void long_sums(unsigned seed) {
  for (const int classes : {2, 8, 40}) {
    constexpr int kImages = 2, kPasses = 1024;
    Random random(seed + classes);
    Buffer<float> logits(static_cast<size_t>(kImages) * kPasses * classes);
    Buffer<float> value(kImages);
    std::vector<double> base(classes);
    for (double& x : base) x = random.normal(2.);
    for (size_t i = 0; i < logits.size(); ++i)
      logits[i] = static_cast<float>(base[i % classes] + random.normal(.1));
    std::vector<double> values;
    for (int b = 0; b < kImages; ++b) {
      const float* const from = logits.get() + static_cast<size_t>(b) * kPasses * classes;
      values.push_back(
          check::uncertainty({from, from + kPasses * classes}, kPasses, classes, false, false).value);
    }
    RowLayout layout{};
    layout.images = kImages;
    layout.image_stride = static_cast<int64_t>(kPasses) * classes;
    layout.pass_stride = classes;
    layout.row = {kPasses, classes, false, false};
    run_rows<float>(seed, logits.get(), logits.get(), nullptr, value.get(), layout, kLarge);
    for (int b = 0; b < kImages; ++b)
      expect_close(std::vector<float>{value[b]}, {values[b]}, 5e-5, 0.,
                   "the value of 1024 passes, C " + std::to_string(classes));
  }
}

void too_large_rows() {
  for (const bool multilabel : {false, true}) {
    const DeviceLimits limits{227 * 1024, 132};
    expect(plan_rows(20, 50000, multilabel, limits).kind == RowPlan::kStreamed, "50,000 classes fit");
    expect(plan_rows(20, 60000, multilabel, limits).kind == RowPlan::kNone, "60,000 classes do not");
    expect(plan_rows(30000, 40, multilabel, limits).kind == RowPlan::kNone, "30,000 passes do not");
    bool refused = false;
    RowLayout layout{};
    layout.images = 1;
    layout.row = {20, 60000, false, multilabel};
    try {
      run_rows<float>(1, nullptr, nullptr, nullptr, nullptr, layout, limits);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    expect(refused, "60,000 classes are refused");
  }
}

template <class T>
void all_heads(unsigned seed) {
  const int fused_shapes[][4] = {{1, 8, 1, 1},     {70, 72, 3, 2},   {130, 64, 32, 8},
                                 {17, 136, 20, 3}, {5, 200, 16, 16}, {40, 128, 7, 11},
                                 {65, 16, 100, 2}, {9, 64, 9, 4},    {129, 80, 31, 8}};
  for (const auto& s : fused_shapes)
    for (int options = 0; options < 4; ++options) {
      ++seed;
      fused<T>(s[0], s[1], s[2], s[3], seed % 2, options & 1, options & 2 ? kSmall : kLarge, HeadPlan::kFused,
               seed);
    }
}

// Every column count and class padding, clusters of 1, 2 and 4 with blocks that have no images, fewer chunks
// of units than stages and more, and one chunk.
template <class T>
void all_wgmma_heads(unsigned seed) {
  const int shapes[][4] = {{1, 8, 1, 1},       {70, 72, 3, 2},    {130, 64, 32, 8},  {17, 136, 20, 3},
                           {5, 200, 16, 16},   {40, 328, 7, 11},  {300, 16, 100, 2}, {9, 64, 9, 4},
                           {129, 520, 31, 8},  {140, 720, 2, 3},  {50, 16, 64, 8},   {65, 200, 33, 8},
                           {130, 264, 32, 16}, {200, 80, 200, 2}, {3, 392, 72, 4},   {195, 336, 40, 5},
                           {70, 136, 18, 13},  {20, 136, 50, 4}};
  for (const auto& s : shapes)
    for (int options = 0; options < 2; ++options) {
      ++seed;
      fused<T>(s[0], s[1], s[2], s[3], seed % 2, options & 1, kLarge, HeadPlan::kWgmma, seed);
    }
}

template <class T>
void all_dropout_heads(unsigned seed) {
  const int shapes[][4] = {{1, 1, 1, 1},    {17, 130, 7, 2},  {5, 45, 20, 3},
                           {33, 64, 32, 8}, {3, 300, 40, 12}, {18, 16, 33, 20}};
  const uint32_t keeps[] = {1, 100, 128, 230, 256};
  for (const auto& s : shapes)
    for (int options = 0; options < 4; ++options) {
      ++seed;
      dropout_head<T>(s[0], s[1], s[2], s[3], keeps[seed % 5], seed % 2, options & 1, options & 2, seed);
    }
}

// The products between the kernels in double: they are torch's.
template <class T>
void information(int images, int count, int samples, int classes, bool multilabel, double size,
                 unsigned seed) {
  Random random(seed);
  const int outcomes = multilabel ? 2 : classes, groups = multilabel ? classes : 1, rows = images * outcomes,
            columns = count * outcomes, passes = groups * samples;
  Buffer<T> logits(static_cast<size_t>(samples) * images * classes),
      targets(static_cast<size_t>(samples) * count * classes), gradient(logits.size());
  Buffer<float> own(static_cast<size_t>(passes) * rows), p(own.size()), mean(groups * rows),
      theirs(static_cast<size_t>(passes) * columns), their_mean(groups * columns), weighted(theirs.size()),
      slope(own.size()), excess(groups * rows), gained(groups * rows),
      joint(static_cast<size_t>(rows) * columns), value(images);
  logits.fill(random, size);
  targets.fill(random, size);
  const int64_t shared = plan_information(images, count, classes, samples, multilabel, kLarge).shared_bytes;
  run_sample_ratios<T>(seed, targets.get(), theirs.get(), nullptr, their_mean.get(),
                       {count, static_cast<int64_t>(count) * classes, samples, classes, multilabel}, shared);
  run_sample_ratios<T>(seed, logits.get(), own.get(), p.get(), mean.get(),
                       {images, static_cast<int64_t>(images) * classes, samples, classes, multilabel},
                       shared);
  run_weigh_ratios(seed, theirs.get(), their_mean.get(), weighted.get(), passes, samples, columns);
  for (size_t i = 0; i < excess.size(); ++i) excess[i] = gained[i] = 0.f;
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        double sum = 0.;
        for (int t = g * samples; t < (g + 1) * samples; ++t)
          sum += static_cast<double>(own[static_cast<size_t>(t) * rows + i]) *
                 theirs[static_cast<size_t>(t) * columns + j];
        joint[static_cast<size_t>(i) * columns + j] = static_cast<float>(sum);
      }
    run_joint_logs(seed, joint.get(), their_mean.get() + g * columns, excess.get() + g * rows,
                   gained.get() + g * rows, rows, columns, 1.f / static_cast<float>(samples));
    // half of the columns, and the rest added to it
    std::vector<float> part(static_cast<size_t>(samples) * rows);
    Buffer<float> rest(part.size());
    for (int t = 0; t < samples; ++t)
      for (int i = 0; i < rows; ++i) {
        double sums[2] = {0., 0.};
        for (int j = 0; j < columns; ++j)
          sums[j >= columns / 2] +=
              static_cast<double>(weighted[static_cast<size_t>(g * samples + t) * columns + j]) *
              joint[static_cast<size_t>(i) * columns + j];
        slope[static_cast<size_t>(g * samples + t) * rows + i] = static_cast<float>(sums[0]);
        rest[static_cast<size_t>(t) * rows + i] = static_cast<float>(sums[1]);
      }
    run_add_to(seed, slope.get() + static_cast<size_t>(g) * samples * rows, rest.get(), samples * rows);
  }
  run_information_gradient<T>(seed, slope.get(), p.get(), mean.get(), excess.get(), gained.get(),
                              gradient.get(), value.get(),
                              {images, static_cast<int64_t>(images) * classes, samples, classes, 0,
                               multilabel, 1.f / static_cast<float>(count)});
  ++used[std::string("information, ") + (multilabel ? "multilabel" : "multiclass")];
  std::vector<double> values, gradients(logits.size());
  for (int b = 0; b < images; ++b) {
    const auto of = [&](Buffer<T>& from, int all, int which) {
      std::vector<double> row;
      for (int t = 0; t < samples; ++t)
        for (int c = 0; c < classes; ++c)
          row.push_back(to_float(from[(static_cast<size_t>(t) * all + which) * classes + c]));
      return row;
    };
    check::Row exact{0., std::vector<double>(static_cast<size_t>(samples) * classes)};
    for (int m = 0; m < count; ++m) {
      const check::Row one =
          check::information(of(logits, images, b), of(targets, count, m), samples, classes, multilabel);
      exact.value += one.value / count;
      for (size_t i = 0; i < exact.gradient.size(); ++i) exact.gradient[i] += one.gradient[i] / count;
    }
    values.push_back(exact.value);
    for (int t = 0; t < samples; ++t)
      for (int c = 0; c < classes; ++c)
        gradients[(static_cast<size_t>(t) * images + b) * classes + c] = exact.gradient[t * classes + c];
  }
  const std::string what = std::string("information ") + name_of<T>() + " B " + std::to_string(images) +
                           " M " + std::to_string(count) + " T " + std::to_string(samples) + " C " +
                           std::to_string(classes) + (multilabel ? " multilabel" : "");
  // relative to its own size however small, down to where the reference cancels
  expect_close(value.values(), values, 1e-5, 1e-13, what + " value");
  const double least = std::is_same_v<T, Half> ? 3e-8 : 1e-13;  // float16 knows nothing smaller
  // a ratio is a difference of float32 log-probabilities: what they are rounded by counts for more the less
  // the passes differ
  const double apart = 1. / (1 << 20) / size;
  expect_close(gradient.values(), gradients, std::fmax(kRounding<T>, apart), least, what + " gradient");
}

template <class T>
void all_information(unsigned seed) {
  const int shapes[][4] = {{1, 1, 1, 1},  {3, 2, 7, 2},  {5, 3, 4, 5},
                           {9, 5, 20, 8}, {2, 4, 3, 40}, {35, 1, 2, 3}};
  for (const auto& s : shapes)
    for (const bool multilabel : {false, true})
      for (const double size : {.01, 2.}) information<T>(s[0], s[1], s[2], s[3], multilabel, size, ++seed);
}

void all_masks(unsigned seed) {
  for (const int units : {1, 16, 45, 333, 512})
    for (const uint32_t keep : {1u, 77u, 128u, 255u, 256u}) masks(3, units, 4, keep, seed + keep);
  for (int i = 0; i < 32; ++i) {
    expansion<float>(3, i % 2 ? 19 : 32, i % 3 ? 1 : 37, 4, 100 + 5 * i, i & 4, i & 8, seed + i);
    expansion<BFloat16>(2, i % 2 ? 40 : 5, i % 3 ? 9 : 1, 5, 100 + 5 * i, i & 4, i & 8, seed + i);
    expansion<Half>(2, 33, i % 3 ? 32 : 1, 3, 200, i & 4, i & 8, seed + i);
  }
}

void all_ascents(unsigned seed) {
  for (const int count : {1, 7, 196, 256, 257, 5000})
    for (const bool l2 : {false, true})
      for (const float radius : {0.f, .5f, 1e3f}) {
        ascent<float>(4, count, 1e-22, .3f, radius, l2, seed + count);
        ascent<Half>(4, count, 1e-3, .3f, radius, l2, seed + count);
        ascent<BFloat16>(4, count, 1e-22, 2.f, radius, l2, seed + count);
      }
}

// Compiled all together, or one of them with -DTSYND_SECTION_name.
#if !defined(TSYND_ONE_SECTION)
#define TSYND_SECTION_rows
#define TSYND_SECTION_fused
#define TSYND_SECTION_wgmma
#define TSYND_SECTION_dropout_head
#define TSYND_SECTION_masks
#define TSYND_SECTION_ascent
#define TSYND_SECTION_information
#endif
const std::map<std::string, void (*)(unsigned)> kSections = {
#if defined(TSYND_SECTION_rows)
    {"rows",
     [](unsigned seed) {
       all_rows<float>(seed);
       all_rows<Half>(seed + 100);
       all_rows<BFloat16>(seed + 200);
       long_sums(seed);
       too_large_rows();
     }},
#endif
#if defined(TSYND_SECTION_fused)
    {"fused",
     [](unsigned seed) {
       all_heads<Half>(seed + 300);
       all_heads<BFloat16>(seed + 400);
     }},
#endif
#if defined(TSYND_SECTION_wgmma)
    {"wgmma",
     [](unsigned seed) {
       all_wgmma_heads<Half>(seed + 800);
       all_wgmma_heads<BFloat16>(seed + 900);
     }},
#endif
#if defined(TSYND_SECTION_dropout_head)
    {"dropout_head",
     [](unsigned seed) {
       all_dropout_heads<float>(seed + 500);
       all_dropout_heads<Half>(seed + 600);
       all_dropout_heads<BFloat16>(seed + 700);
       dropout_head<BFloat16>(20, 2048, 64, 8, 128, true, false, false, seed + 1);  // eight warps a block
     }},
#endif
#if defined(TSYND_SECTION_masks)
    {"masks", all_masks},
#endif
#if defined(TSYND_SECTION_ascent)
    {"ascent", all_ascents},
#endif
#if defined(TSYND_SECTION_information)
    {"information",
     [](unsigned seed) {
       all_information<float>(seed);
       all_information<Half>(seed + 50);
       all_information<BFloat16>(seed + 100);
     }},
#endif
};

}  // namespace

// test_kernels [ORDER of the threads [SECTION ...]]
int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 1;
  for (int i = 2; i < argc; ++i)
    if (!kSections.count(argv[i])) {
      std::fprintf(stderr, "no section %s\n", argv[i]);
      return 2;
    }
  for (const auto& [name, run] : kSections) {
    bool wanted = argc < 3;
    for (int i = 2; i < argc; ++i) wanted |= name == argv[i];
    if (wanted) run(seed);
  }
  for (const auto& [kernel, count] : used) std::printf("%4d x %s\n", count, kernel.c_str());
  std::printf("%d checks, %d failed\n", check::checks, check::failures);
  return check::failures != 0;
}
