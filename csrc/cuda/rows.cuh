// Kernels from logits in memory to value and logit gradient, one read and one write of each logit where it
// fits.
#pragma once

#include "image_row.cuh"
#include "rows.h"

namespace tsynd {

constexpr int kRowThreads = 128;  // of register_rows
constexpr int kBlockRowWarps = kRowWarps;
constexpr int kBlockRowThreads = kBlockRowWarps * kWarp;  // of block_rows

template <class T>
struct alignas(16) Vector16 {
  T at[16 / sizeof(T)];
};

// kClasses consecutive values, those from `classes` on are -inf.
template <class T, int kClasses>
TSYND_DEVICE void load_pass(float (&out)[kClasses], const T* from, int classes, bool vector) {
  constexpr int kEach = 16 / sizeof(T);
  if (kClasses >= kEach && vector) {
#pragma unroll
    for (int i = 0; i < kClasses / kEach; ++i) {
      const Vector16<T> part = reinterpret_cast<const Vector16<T>*>(from)[i];
#pragma unroll
      for (int e = 0; e < kEach; ++e) out[i * kEach + e] = to_float(part.at[e]);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < kClasses; ++c) out[c] = c < classes ? to_float(from[c]) : -infinity();
}

template <class T, int kClasses>
TSYND_DEVICE void store_pass(const float (&in)[kClasses], T* to, int classes, bool vector) {
  constexpr int kEach = 16 / sizeof(T);
  if (kClasses >= kEach && vector) {
#pragma unroll
    for (int i = 0; i < kClasses / kEach; ++i) {
      Vector16<T> part;
#pragma unroll
      for (int e = 0; e < kEach; ++e) part.at[e] = from_float<T>(in[i * kEach + e]);
      reinterpret_cast<Vector16<T>*>(to)[i] = part;
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < kClasses; ++c)
    if (c < classes) to[c] = from_float<T>(in[c]);
}

// Softmax over up to kClasses classes, up to lanes * kPasses passes: `lanes` lanes per image, logits in
// registers. The gradient may lie where the logits are.
template <class T, int kPasses, int kClasses>
__global__ void __launch_bounds__(kRowThreads)
    register_rows(const T* logits, T* gradient, const T* bias, float* value, RowLayout layout) {
  const int rows = kWarp / layout.lanes, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t image = warp * rows + lane / layout.lanes;
  const bool real = image < layout.images;  // lanes without an image still take part in the exchanges
  const int member = lane % layout.lanes;
  const int64_t base = (real ? image : 0) * layout.image_stride;
  float v[kPasses][kClasses];
#pragma unroll
  for (int g = 0; g < kPasses; ++g) {
    const int t = g * layout.lanes + member;
    if (t < layout.row.samples) {
      load_pass(v[g], logits + base + t * layout.pass_stride, layout.row.classes, layout.vector);
      if (bias != nullptr)
#pragma unroll
        for (int c = 0; c < kClasses; ++c)
          if (c < layout.row.classes) v[g][c] += to_float(bias[t * layout.bias_stride + c]);
    } else {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) v[g][c] = 0.f;
    }
  }
  const float result = multiclass_row<Math<T>>(v, layout.row, member, layout.lanes);
  if (!real) return;
#pragma unroll
  for (int g = 0; g < kPasses; ++g) {
    const int t = g * layout.lanes + member;
    if (t < layout.row.samples)
      store_pass(v[g], gradient + base + t * layout.pass_stride, layout.row.classes, layout.vector);
  }
  if (member == 0) value[image] = result;
}

// Any shape, a block per image. Where kStaged the logits are read once and kept in shared memory, otherwise
// they are read three times.
template <class T, bool kStaged>
__global__ void __launch_bounds__(kBlockRowThreads, 3)
    block_rows(const T* logits, T* gradient, const T* bias, float* value, RowLayout layout) {
  using M = Math<T>;
  const int samples = layout.row.samples, classes = layout.row.classes,
            lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const bool entropy = layout.row.entropy;
  float* top_of = reinterpret_cast<float*>(shared_memory());  // [T] largest logit
  float* log_sum = top_of + samples;                          // [T] log of the sum of shifted exponentials
  float* log_mean = log_sum + samples;                        // [C] log mean probability
  float* partial = log_mean + classes;                        // [warps]
  float* staged = partial + kBlockRowWarps;                   // [T, C]
  const int64_t base = static_cast<int64_t>(blockIdx.x) * layout.image_stride;
  const auto read = [&](int t, int c) {
    const float x = to_float(logits[base + t * layout.pass_stride + c]);
    return bias == nullptr ? x : x + to_float(bias[t * layout.bias_stride + c]);
  };
  const auto at = [&](int t, int c) {
    return kStaged ? staged[static_cast<int64_t>(t) * classes + c] : read(t, c);
  };
  // lanes of a warp side by side over classes, and over passes where there are few classes
  int width = 1;
  while (width < kWarp && width < classes) width *= 2;
  const int member = lane % width, group = lane / width, groups = kWarp / width;
  const auto across = [&](float x, bool largest) {  // lanes with the same member
    for (int offset = kWarp / 2; offset >= width; offset /= 2) {
      const float other = shuffle_xor(x, offset);
      x = largest ? M::max(x, other) : x + other;
    }
    return x;
  };
  const auto log_mean_of = [&](bool active, const auto& logp) {
    float top = 2.f * kLogFloor, sum = 0.f;
    if (active)
      for (int t = group; t < samples; t += groups) top = M::max(top, logp(t));
    top = across(top, true);
    if (active)
      for (int t = group; t < samples; t += groups) sum += M::expm1(logp(t) - top);
    return top + M::log1p(across(sum, false) / static_cast<float>(samples));
  };
  if (kStaged) {
    for (int t = warp; t < samples; t += kBlockRowWarps)
      for (int c = lane; c < classes; c += kWarp) staged[static_cast<int64_t>(t) * classes + c] = read(t, c);
    sync_block();
  }
  const float inverse = 1.f / static_cast<float>(samples);
  float total = 0.f;
  if (layout.row.multilabel) {
    for (int first = warp * width; first < classes; first += kBlockRowWarps * width) {
      const int c = first + member;
      const bool active = c < classes;
      const float q1 = log_mean_of(active, [&](int t) { return bernoulli<M>(at(t, c)).log1; });
      const float q0 = log_mean_of(active, [&](int t) { return bernoulli<M>(at(t, c)).log0; });
      for (int t = group; active && t < samples; t += groups) {
        const Bernoulli<M> b = bernoulli<M>(at(t, c));
        const float r1 = (entropy ? 0.f : b.log1) - q1, r0 = (entropy ? 0.f : b.log0) - q0;
        const float p1 = M::exp(b.log1), p0 = M::exp(b.log0);
        total += p1 * r1 + p0 * r0;
        gradient[base + t * layout.pass_stride + c] = from_float<T>(p1 * p0 * (r1 - r0) * inverse);
      }
    }
  } else {
    for (int t = warp; t < samples; t += kBlockRowWarps) {
      float top = -infinity(), rest = 0.f, ties = 0.f;
      for (int c = lane; c < classes; c += kWarp) top = M::max(top, at(t, c));
      top = team_max(top, kWarp);
      for (int c = lane; c < classes; c += kWarp) {
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
    for (int first = warp * width; first < classes; first += kBlockRowWarps * width) {
      const int c = first + member;
      const float result = log_mean_of(c < classes, [&](int t) { return logp(t, c); });
      if (c < classes && group == 0) log_mean[c] = result;
    }
    sync_block();
    for (int t = warp; t < samples; t += kBlockRowWarps) {
      float inner = 0.f;
      for (int c = lane; c < classes; c += kWarp) {
        const float l = logp(t, c);
        inner += M::exp(l) * ((entropy ? 0.f : l) - log_mean[c]);
      }
      inner = team_sum(inner, kWarp);
      if (lane == 0) total += inner;
      for (int c = lane; c < classes; c += kWarp) {
        const float l = logp(t, c);
        gradient[base + t * layout.pass_stride + c] =
            from_float<T>(M::exp(l) * ((entropy ? 0.f : l) - log_mean[c] - inner) * inverse);
      }
    }
  }
  total = team_sum(total, kWarp);
  if (lane == 0) partial[warp] = total;
  sync_block();
  if (threadIdx.x == 0) {
    total = 0.f;
    for (int w = 0; w < kBlockRowWarps; ++w) total += partial[w];
    value[blockIdx.x] = M::max(total * inverse, 0.f);
  }
}

template <class T>
void run_rows(Stream stream, const T* logits, T* gradient, const T* bias, float* value, RowLayout layout,
              const DeviceLimits& limits) {
  const RowPlan plan = plan_rows(layout.row.samples, layout.row.classes, layout.row.multilabel, limits);
  if (plan.kind == RowPlan::kNone) refuse_rows(layout.row.samples, layout.row.classes, limits);
  if (plan.kind == RowPlan::kRegisters) {
    layout.lanes = plan.lanes;
    const auto aligned = [](const void* p, int64_t stride) {
      return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    };
    layout.vector = plan.classes == layout.row.classes && aligned(logits, layout.pass_stride) &&
                    aligned(gradient, layout.image_stride);
    const int64_t blocks = blocks_for(layout.images * plan.lanes, kRowThreads);
    with_constant<2, 4, 8, 16, 32>(plan.classes, [&](auto classes) {
      constexpr int kClasses = decltype(classes)::value;
      if constexpr (kClasses <= 16) {
        if (plan.slots == 16)
          return launch(stream, register_rows<T, 16 / kClasses, kClasses>, blocks, kRowThreads, 0, logits,
                        gradient, bias, value, layout);
      }
      launch(stream, register_rows<T, 64 / kClasses, kClasses>, blocks, kRowThreads, 0, logits, gradient,
             bias, value, layout);
    });
  } else if (plan.kind == RowPlan::kStaged) {
    launch(stream, block_rows<T, true>, layout.images, kBlockRowThreads, plan.shared_bytes, logits, gradient,
           bias, value, layout);
  } else {
    launch(stream, block_rows<T, false>, layout.images, kBlockRowThreads, plan.shared_bytes, logits, gradient,
           bias, value, layout);
  }
}

}  // namespace tsynd
