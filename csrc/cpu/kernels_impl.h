// The kernels of one instruction set; included by kernels_*.cpp alone (see simd.h for the rules).
#pragma once

#include "elements.h"
#include "kernels.h"

namespace tsynd::TSYND_ISA {
namespace {

struct TileRows {
  float* logits;
  int64_t stride;
  const float* bias;
  TSYND_HD VFloat read(const TileRows& rows, int64_t i) { return load(rows.logits + i * rows.stride); }
  inline __attribute__((always_inline)) VFloat in(int64_t i) const {
    return bias ? read(*this, i) + splat(bias[i]) : read(*this, i);
  }
  inline __attribute__((always_inline)) VFloat get(int64_t i) const { return read(*this, i); }
  inline __attribute__((always_inline)) void put(int64_t i, VFloat x) { store(logits + i * stride, x); }
};

void uncertainty(const UncertaintyTile& tile) {
  TileRows rows{tile.logits, tile.stride, tile.bias};
  VFloat* p = reinterpret_cast<VFloat*>(tile.scratch);
  VFloat* q = p + tile.samples * tile.classes;
  const VFloat value =
      tile.task == Task::kMulticlass
          ? multiclass_uncertainty<VMath>(rows, p, q, tile.samples, tile.classes, tile.objective)
          : multilabel_uncertainty<VMath>(rows, p, q, tile.samples, tile.classes, tile.objective);
  store(tile.value, value);
}

// logits[c] = sum over kept units of features * weight[c], for kChunk classes at once.
template <int kChunk>
TSYND_HD void masked_dot(const float* features, const float* weight, int64_t padded, const uint16_t* bits,
                         float* logits) {
  VFloat sums[kChunk] = {};
  for (int64_t unit = 0; unit < padded; unit += kUnitsPerBlock) {
    const uint32_t block = bits[unit / kUnitsPerBlock];
    for (int part = 0; part < kUnitsPerBlock; part += kLanes) {
      const VFloat kept = expand_bits(block, part) ? load(features + unit + part) : VFloat{};
      for (int c = 0; c < kChunk; ++c) sums[c] += kept * load(weight + c * padded + unit + part);
    }
  }
  for (int c = 0; c < kChunk; ++c) logits[c] = sum_lanes(sums[c]);
}

// features_gradient += sum_c weight[c] * sum over passes of kept * gradient[t][c], for kChunk classes at
// once.
template <int kChunk>
TSYND_HD void masked_transpose_dot(const float* gradient, int64_t classes, const float* weight,
                                   int64_t padded, const uint16_t* bits, int64_t bits_stride, int64_t samples,
                                   bool first, float* features_gradient) {
  for (int64_t unit = 0; unit < padded; unit += kUnitsPerBlock)
    for (int part = 0; part < kUnitsPerBlock; part += kLanes) {
      VFloat sums[kChunk] = {};
      for (int64_t t = 0; t < samples; ++t) {
        const VInt kept = expand_bits(bits[t * bits_stride + unit / kUnitsPerBlock], part);
        for (int c = 0; c < kChunk; ++c) sums[c] += kept ? splat(gradient[t * classes + c]) : VFloat{};
      }
      VFloat total = first ? VFloat{} : load(features_gradient + unit + part);
      for (int c = 0; c < kChunk; ++c) total += sums[c] * load(weight + c * padded + unit + part);
      store(features_gradient + unit + part, total);
    }
}

template <int kWidth>
struct Chunk {
  static constexpr int kValue = kWidth;
};

// f(Chunk<n>, first class) over all classes, in chunks that fit the registers.
template <class F>
TSYND_HD void for_class_chunks(int64_t classes, const F& f) {
  int64_t c = 0;
  for (; c + 8 <= classes; c += 8) f(Chunk<8>{}, c);
  for (; c + 4 <= classes; c += 4) f(Chunk<4>{}, c);
  for (; c + 2 <= classes; c += 2) f(Chunk<2>{}, c);
  for (; c < classes; ++c) f(Chunk<1>{}, c);
}

void dropout_head(const DropoutHeadTile& tile) {
  const int64_t padded = tile.blocks * kUnitsPerBlock;
  const int64_t classes = tile.classes, samples = tile.samples;
  const int64_t columns = samples * classes;
  const int64_t bits_stride = (tile.blocks + kLanes - 1) / kLanes * kLanes;
  float* logits = tile.scratch + uncertainty_scratch(samples, classes);  // [columns][lanes]
  float* row = logits + columns * kLanes;                                // [columns]
  uint16_t* bits = reinterpret_cast<uint16_t*>(row + columns);           // [images][samples][bits_stride]
  const float scale = 256.f / static_cast<float>(tile.keep);

  for (int64_t image = 0; image < tile.images; ++image) {
    const float* features = tile.features + image * padded;
    const MaskAddress at = mask_address(tile.seed, tile.layer, tile.sample_ids[image]);
    for (int64_t t = 0; t < samples; ++t) {
      uint16_t* pass = bits + (image * samples + t) * bits_stride;
      for (int64_t block = 0; block < tile.blocks; block += kLanes)
        mask_blocks(at, static_cast<uint32_t>(block), static_cast<uint32_t>(t), tile.keep, pass + block);
      float* out = row + t * classes;
      for_class_chunks(classes, [&](auto chunk, int64_t c) {
        masked_dot<decltype(chunk)::kValue>(features, tile.weight + c * padded, padded, pass, out + c);
      });
    }
    for (int64_t i = 0; i < columns; ++i)
      logits[i * kLanes + image] = row[i] * scale + (tile.bias ? tile.bias[i % classes] : 0.f);
  }
  for (int64_t image = tile.images; image < kLanes; ++image)
    for (int64_t i = 0; i < columns; ++i) logits[i * kLanes + image] = 0.f;

  uncertainty(UncertaintyTile{logits, kLanes, nullptr, samples, classes, tile.objective, tile.task,
                              tile.value, tile.scratch});

  for (int64_t image = 0; image < tile.images; ++image) {
    for (int64_t i = 0; i < columns; ++i) row[i] = logits[i * kLanes + image] * scale;
    const uint16_t* passes = bits + image * samples * bits_stride;
    float* out = tile.features_gradient + image * padded;
    for_class_chunks(classes, [&](auto chunk, int64_t c) {
      masked_transpose_dot<decltype(chunk)::kValue>(row + c, classes, tile.weight + c * padded, padded,
                                                    passes, bits_stride, samples, c == 0, out);
    });
  }
}

template <bool kAdd>
TSYND_HD void masked(const float* x, float* out, int64_t blocks, uint32_t pass, uint32_t keep,
                     MaskAddress at) {
  const VFloat scale = splat(256.f / static_cast<float>(keep));
  uint16_t bits[kLanes];
  for (int64_t first = 0; first < blocks; first += kLanes) {
    mask_blocks(at, static_cast<uint32_t>(first), pass, keep, bits);
    const int64_t count = blocks - first < kLanes ? blocks - first : kLanes;
    for (int64_t block = 0; block < count; ++block)
      for (int part = 0; part < kUnitsPerBlock; part += kLanes) {
        const int64_t unit = (first + block) * kUnitsPerBlock + part;
        const VFloat kept = expand_bits(bits[block], part) ? load(x + unit) * scale : VFloat{};
        store(out + unit, kAdd ? load(out + unit) + kept : kept);
      }
  }
}

void masked_copy(const float* x, float* out, int64_t blocks, uint32_t pass, uint32_t keep, MaskAddress at) {
  masked<false>(x, out, blocks, pass, keep, at);
}

void masked_add(const float* x, float* out, int64_t blocks, uint32_t pass, uint32_t keep, MaskAddress at) {
  masked<true>(x, out, blocks, pass, keep, at);
}

void mask_bytes(uint8_t* out, int64_t units, uint32_t pass, uint32_t keep, MaskAddress at) {
  uint16_t bits[kLanes];
  for (int64_t first = 0; first < units; first += kLanes * kUnitsPerBlock) {
    mask_blocks(at, static_cast<uint32_t>(first / kUnitsPerBlock), pass, keep, bits);
    const int64_t count = units - first < kLanes * kUnitsPerBlock ? units - first : kLanes * kUnitsPerBlock;
    for (int64_t unit = 0; unit < count; ++unit)
      out[first + unit] = static_cast<uint8_t>((bits[unit / kUnitsPerBlock] >> (unit % kUnitsPerBlock)) & 1u);
  }
}

// One image's classes from `first` on, lane part by lane part: afterwards vector j holds, in its 128-bit part
// g, four classes of image 4 g + j, so that transposing the parts gives a vector of images per class.
template <class T>
TSYND_HD void load_classes(const T* from, int64_t stride, int64_t images, int count, VFloat* four) {
  for (int j = 0; j < 4; ++j) {
    VFour parts[kLanes / 4];
    for (int g = 0; g < kLanes / 4; ++g)
      parts[g] = 4 * g + j < images ? load_four(from + (4 * g + j) * stride, count) : VFour{};
    four[j] = join_parts(parts);
  }
}

template <class T>
TSYND_HD void store_classes(T* to, int64_t stride, int64_t images, int count, const VFloat* four) {
  for (int j = 0; j < 4; ++j) {
    VFour parts[kLanes / 4];
    split_parts(four[j], parts);
    for (int g = 0; g < kLanes / 4; ++g)
      if (4 * g + j < images) store_four(to + (4 * g + j) * stride, parts[g], count);
  }
}

// Reads a tile once, brings its images side by side, works on it in cache and writes the gradient once.
template <class T>
TSYND_HD void logits_rows(const LogitsTile& tile) {
  const T* in = static_cast<const T*>(tile.logits);
  T* out = static_cast<T*>(tile.gradient);
  const int64_t samples = tile.samples, classes = tile.classes, images = tile.images;
  float* rows = tile.scratch;  // [samples][classes][lanes]
  for (int64_t t = 0; t < samples; ++t) {
    const T* pass = in + t * tile.pass_stride;
    // the next tile: every pass is a stream of its own, more than the processor follows by itself
    for (int64_t i = 0; i < kLanes * classes; i += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(pass + images * classes + i, 0, 2);
    float* to = rows + t * classes * kLanes;
    for (int64_t c = 0; c < classes; c += 4) {
      const int count = static_cast<int>(classes - c < 4 ? classes - c : 4);
      VFloat four[4];
      load_classes(pass + c, classes, images, count, four);
      transpose_parts(four);
      for (int i = 0; i < count; ++i) store(to + (c + i) * kLanes, four[i]);
    }
  }
  uncertainty(UncertaintyTile{rows, kLanes, nullptr, samples, classes, tile.objective, tile.task, tile.value,
                              rows + samples * classes * kLanes});
  for (int64_t t = 0; t < samples; ++t) {
    const float* from = rows + t * classes * kLanes;
    for (int64_t c = 0; c < classes; c += 4) {
      const int count = static_cast<int>(classes - c < 4 ? classes - c : 4);
      VFloat four[4] = {};
      for (int i = 0; i < count; ++i) four[i] = load(from + (c + i) * kLanes);
      transpose_parts(four);
      store_classes(out + t * tile.pass_stride + c, classes, images, count, four);
    }
  }
}

void logits(const LogitsTile& tile) {
  if (tile.bf16)
    logits_rows<Bf16>(tile);
  else
    logits_rows<float>(tile);
}

// [outcomes][lanes] to images' rows of outcomes.
TSYND_HD void store_outcomes(const VFloat* from, float* to, int64_t outcomes, int64_t images) {
  for (int64_t k = 0; k < outcomes; k += 4) {
    const int count = static_cast<int>(outcomes - k < 4 ? outcomes - k : 4);
    VFloat four[4] = {};
    for (int i = 0; i < count; ++i) four[i] = from[k + i];
    transpose_parts(four);
    store_classes(to + k, outcomes, images, count, four);
  }
}

void ratios(const RatiosTile& tile) {
  const int64_t samples = tile.samples, classes = tile.classes;
  const bool multiclass = tile.task == Task::kMulticlass;
  const int64_t outcomes = multiclass ? classes : 2, groups = multiclass ? 1 : classes,
                all = groups * outcomes;
  VFloat* const logp = reinterpret_cast<VFloat*>(tile.scratch);  // [samples][groups][outcomes]
  VFloat* const p = logp + samples * all;                        // [groups][outcomes], then the means
  TileRows rows{tile.scratch, kLanes, nullptr};
  for (int64_t t = 0; t < samples; ++t) {
    for (int64_t c = 0; c < classes; c += 4) {
      const int count = static_cast<int>(classes - c < 4 ? classes - c : 4);
      VFloat four[4];
      load_classes(tile.logits + t * tile.pass_stride + c, classes, tile.images, count, four);
      transpose_parts(four);
      for (int i = 0; i < count; ++i) {
        if (multiclass) {
          logp[t * all + c + i] = four[i];
        } else {
          const Bernoulli<VMath> b = bernoulli<VMath>(four[i]);
          logp[t * all + 2 * (c + i)] = b.log1;
          logp[t * all + 2 * (c + i) + 1] = b.log0;
        }
      }
    }
    if (multiclass) log_softmax<VMath>(rows, t * all, p, classes);
    if (tile.p == nullptr) continue;
    if (!multiclass)
      for (int64_t i = 0; i < all; ++i) p[i] = VMath::exp(logp[t * all + i]);
    for (int64_t g = 0; g < groups; ++g)
      store_outcomes(p + g * outcomes, tile.p + (g * samples + t) * tile.stride, outcomes, tile.images);
  }
  VFloat* const mean = p;
  for (int64_t i = 0; i < all; ++i)
    mean[i] = log_mean<VMath>([&](int64_t t) { return logp[t * all + i]; }, samples);
  for (int64_t t = 0; t < samples; ++t)
    for (int64_t g = 0; g < groups; ++g) {
      VFloat* const own = logp + t * all + g * outcomes;
      for (int64_t k = 0; k < outcomes; ++k) own[k] = VMath::expm1(own[k] - mean[g * outcomes + k]);
      store_outcomes(own, tile.ratio + (g * samples + t) * tile.stride, outcomes, tile.images);
    }
  for (int64_t i = 0; i < all; ++i) mean[i] = VMath::exp(mean[i]);
  for (int64_t g = 0; g < groups; ++g)
    store_outcomes(mean + g * outcomes, tile.mean + g * tile.stride, outcomes, tile.images);
}

// f(index, count) over `total` elements, kLanes at a time and then the rest.
template <class F>
TSYND_HD void for_vectors(int64_t total, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= total; i += kLanes) f(i, kLanes);
  if (i < total) f(i, static_cast<int>(total - i));
}

void information(const InformationTile& tile) {
  const VFloat scale = splat(tile.scale);
  for (int64_t row = 0; row < tile.rows; ++row) {
    float* const joint = tile.joint + row * tile.columns;
    VFloat excess = VFloat{}, gained = VFloat{};
    for_vectors(tile.columns, [&](int64_t j, int n) {
      const JointRatio<VMath> ratio = joint_ratio<VMath>(load_some(joint + j, n) * scale);
      const VFloat mean = load_some(tile.mean + j, n);  // 0 behind the last column
      excess += mean * ratio.excess;
      gained += mean * (ratio.excess + ratio.d * ratio.log);
      store_some(joint + j, ratio.log, n);
    });
    tile.excess[row] += sum_lanes(excess);
    tile.gained[row] += sum_lanes(gained);
  }
}

// The largest absolute value's bits: 0 where all are zero, at least 0x7F800000 where one is not finite.
template <class T>
TSYND_HD int32_t largest_bits(const T* x, int64_t count) {
  VInt top = VInt{};
  for_vectors(count, [&](int64_t i, int n) {
    const VInt bits = (VInt)load_some(x + i, n) & 0x7FFFFFFF;
    top = bits > top ? bits : top;
  });
  int32_t out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out = top[lane] > out ? top[lane] : out;
  return out;
}

// With d = z - z0 and x = g scaled by a power of two, so that the squares of a confident classifier's tiny
// gradient do not underflow: sums of x^2, x d and d^2, in double from one short run to the next.
template <class T>
TSYND_HD void ascend_sums(const T* z, const T* g, const T* z0, int64_t count, float scale,
                          double (&sums)[3]) {
  constexpr int64_t kRun = 32 * kLanes;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t length = count - begin < kRun ? count - begin : kRun;
    VFloat xx = VFloat{}, xd = VFloat{}, dd = VFloat{};
    for_vectors(length, [&](int64_t i, int n) {
      const VFloat x = load_some(g + begin + i, n) * scale;
      const VFloat d = load_some(z + begin + i, n) - load_some(z0 + begin + i, n);
      xx += x * x;
      xd += x * d;
      dd += d * d;
    });
    sums[0] += sum_lanes(xx);
    sums[1] += sum_lanes(xd);
    sums[2] += sum_lanes(dd);
  }
}

template <class T>
TSYND_HD void ascend_row(const AscentRow& row) {
  T* z = static_cast<T*>(row.latent);
  const T* g = static_cast<const T*>(row.gradient);
  const T* z0 = static_cast<const T*>(row.origin);
  const int32_t top = largest_bits(g, row.count);
  if (top == 0 || top >= 0x7F800000) return;  // zero or not finite: this image stays
  if (row.rule == AscentRule::kLinf) {
    const VFloat zero = VFloat{}, step = splat(row.step), radius = splat(row.radius);
    for_vectors(row.count, [&](int64_t i, int n) {
      const VFloat x = load_some(g + i, n), from = load_some(z0 + i, n);
      const VFloat moved = load_some(z + i, n) + (x > zero ? step : x < zero ? -step : zero) - from;
      store_some(z + i, from + (moved > radius ? radius : moved < -radius ? -radius : moved), n);
    });
    return;
  }
  const int exponent = (top >> 23) - 127;
  const int32_t scale_bits = (127 - (exponent < -126 ? -126 : exponent > 126 ? 126 : exponent)) << 23;
  float scale;
  __builtin_memcpy(&scale, &scale_bits, 4);
  double sums[3] = {0., 0., 0.};
  ascend_sums(z, g, z0, row.count, scale, sums);
  const double factor = row.step / __builtin_sqrt(sums[0]);
  const double squared = sums[2] + 2. * factor * sums[1] + factor * factor * sums[0];
  const double distance = squared > 0. ? __builtin_sqrt(squared) : 0.;
  const VFloat move = splat(static_cast<float>(factor));
  if (distance > row.radius) {
    const VFloat shrink = splat(static_cast<float>(row.radius / distance));
    for_vectors(row.count, [&](int64_t i, int n) {
      const VFloat from = load_some(z0 + i, n), x = load_some(g + i, n) * scale;
      store_some(z + i, from + shrink * ((load_some(z + i, n) - from) + move * x), n);
    });
  } else {
    for_vectors(row.count, [&](int64_t i, int n) {
      store_some(z + i, load_some(z + i, n) + move * (load_some(g + i, n) * scale), n);
    });
  }
}

void ascend(const AscentRow& row) {
  if (row.bf16)
    ascend_row<Bf16>(row);
  else
    ascend_row<float>(row);
}

}  // namespace

const Kernels kKernels = {TSYND_ISA_NAME, kLanes,      uncertainty, logits,     ratios, information,
                          dropout_head,   masked_copy, masked_add,  mask_bytes, ascend};

}  // namespace tsynd::TSYND_ISA
