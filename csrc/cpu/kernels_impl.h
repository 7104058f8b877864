// The kernels of one instruction set; included by kernels_*.cpp alone (see simd.h for the rules).
#pragma once

#include "kernels.h"
#include "simd.h"

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

struct Bf16 {
  uint16_t bits;
};
TSYND_HD float to_float(float x) { return x; }
TSYND_HD float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
TSYND_HD void assign(float& to, float x) { to = x; }
TSYND_HD void assign(Bf16& to, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const bool nan = x != x;
  bits += 0x7FFFu + ((bits >> 16) & 1u);  // round to nearest even
  to.bits = nan ? static_cast<uint16_t>(0x7FC0) : static_cast<uint16_t>(bits >> 16);
}

template <class T>
TSYND_HD void ascend_row(const AscentRow& row) {
  T* z = static_cast<T*>(row.latent);
  const T* g = static_cast<const T*>(row.gradient);
  const T* z0 = static_cast<const T*>(row.origin);
  // double: squares of the tiny gradients of a confident classifier underflow in float
  double norm = 0.;
#pragma omp simd reduction(+ : norm)
  for (int64_t i = 0; i < row.count; ++i) {
    const double x = to_float(g[i]);
    norm += x * x;
  }
  if (!(norm > 0. && norm <= 1.7976931348623157e308)) return;  // zero or not finite: this image stays
  if (row.rule == AscentRule::kLinf) {
#pragma omp simd
    for (int64_t i = 0; i < row.count; ++i) {
      const float x = to_float(g[i]), from = to_float(z0[i]);
      const float moved = to_float(z[i]) + (x > 0.f ? row.step : x < 0.f ? -row.step : 0.f) - from;
      const float limited = moved > row.radius ? row.radius : moved < -row.radius ? -row.radius : moved;
      assign(z[i], from + limited);
    }
    return;
  }
  const double scale = row.step / __builtin_sqrt(norm);
  double distance = 0.;
#pragma omp simd reduction(+ : distance)
  for (int64_t i = 0; i < row.count; ++i) {
    const double offset = to_float(z[i]) + scale * to_float(g[i]) - to_float(z0[i]);
    distance += offset * offset;
  }
  distance = __builtin_sqrt(distance);
  const double shrink = distance > row.radius ? row.radius / distance : 1.;
#pragma omp simd
  for (int64_t i = 0; i < row.count; ++i) {
    const double from = to_float(z0[i]);
    assign(z[i], static_cast<float>(from + shrink * (to_float(z[i]) + scale * to_float(g[i]) - from)));
  }
}

void ascend(const AscentRow& row) {
  if (row.bf16)
    ascend_row<Bf16>(row);
  else
    ascend_row<float>(row);
}

}  // namespace

const Kernels kKernels = {TSYND_ISA_NAME, kLanes,     uncertainty, dropout_head,
                          masked_copy,    masked_add, mask_bytes,  ascend};

}  // namespace tsynd::TSYND_ISA
