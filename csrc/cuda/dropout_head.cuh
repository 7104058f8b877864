// dropout_head_uncertainty: masks are made in registers where they are used, once for the logits and once
// more for the gradient, and never stored. Two kernels: tensor cores for narrow dtypes, plain multiply-adds
// for float32.
#pragma once

#include "image_row.cuh"
#include "mask_bits.cuh"

namespace tsynd {

struct DropoutHead {
  int64_t images;
  int units, padded;  // D, and D rounded up to kHeadUnits
  RowTask row;
  MaskStream stream;
  float scale;  // 1 / realised keep probability
  int lanes;    // of the row arithmetic
};

constexpr int kHeadUnits = 128;
constexpr int kHeadImages = 16;  // of a block with tensor cores
constexpr int kHeadSlots = 64;   // logits a lane can hold
constexpr int kHeadMostThreads = 8 * kWarp;
constexpr int kDirectWarps = 8;  // images of a block without

TSYND_HD int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Rows are four values longer than they need be: the eight 8-byte reads of a half warp then touch all banks.
TSYND_HD int head_row_stride(int padded) { return padded + 4; }
TSYND_HD int head_logit_bytes(int samples, int classes_padded) {
  const int logits = samples * classes_padded * 4, slopes = classes_padded * round_up(samples, 16) * 2;
  return logits > slopes ? logits : slopes;
}
template <class T>
struct One;
template <>
struct One<BFloat16> {
  static constexpr uint32_t kPair = 0x3F803F80u;
};
template <>
struct One<Half> {
  static constexpr uint32_t kPair = 0x3C003C00u;
};

// Sums of 32 values over the lanes that differ in the bits kWidth, kWidth / 2, ..., kLast: each exchange
// halves what a lane holds, which ends as 32 / lanes values from its own place on. Recursion, for the
// compiler leaves loops over halving widths rolled and the values in local memory.
template <int kWidth, int kLast>
TSYND_DEVICE void fold(float (&x)[32], int lane) {
  const bool upper = (lane & kWidth) != 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float sent = upper ? x[i] : x[i + kWidth], mine = upper ? x[i + kWidth] : x[i];
    x[i] = mine + shuffle_xor(sent, kWidth);
  }
  if constexpr (kWidth > kLast) fold<kWidth / 2, kLast>(x, lane);
}

// [rows, units] from memory into rows of `stride`, with zeros up to `padded` and in rows from `rows` to
// `all_rows`.
template <class T>
TSYND_DEVICE void stage_rows(T* to, const T* from, int64_t rows, int all_rows, int units, int padded,
                             int stride) {
  for (int i = static_cast<int>(threadIdx.x); i < all_rows * padded; i += static_cast<int>(blockDim.x)) {
    const int row = i / padded, unit = i % padded;
    to[row * stride + unit] =
        row < rows && unit < units ? from[static_cast<int64_t>(row) * units + unit] : from_float<T>(0.f);
  }
}

// The row arithmetic of one image: logits [T][kClasses] float32 in, slopes [kClasses][T up to 16 n] narrow
// out, in the same memory. All lanes of a warp call it, `job.lanes` of them for an image.
template <class T, int kClasses>
TSYND_DEVICE float head_row(unsigned char* memory, const DropoutHead& job, int member) {
  constexpr int kPasses = kHeadSlots / kClasses;
  float* const logits = reinterpret_cast<float*>(memory);
  float v[kPasses][kClasses], result = 0.f;
  if (job.row.multilabel) {
    result = multilabel_row<Math<T>, kClasses>(logits, job.row, member, job.lanes);
    sync_warp();
  }
#pragma unroll
  for (int g = 0; g < kPasses; ++g)
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const int t = g * job.lanes + member;
      v[g][c] = t < job.row.samples ? logits[t * kClasses + c] : 0.f;
      if (job.row.multilabel && c >= job.row.classes) v[g][c] = 0.f;
    }
  if (!job.row.multilabel) result = multiclass_row<Math<T>>(v, job.row, member, job.lanes);
  sync_warp();
  T* const slopes = reinterpret_cast<T*>(memory);
  const int passes = round_up(job.row.samples, 16);
#pragma unroll
  for (int g = 0; g < kPasses; ++g)
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const int t = g * job.lanes + member;
      if (t < passes) slopes[c * passes + t] = from_float<T>(v[g][c]);
    }
  return result;
}

// 16 images a block; the warps share out the passes, then the images. Units are dealt to the fragments'
// positions so that a lane's 16 are those of one Philox call: nothing is made twice and nothing exchanged.
template <class T, int kClasses>
__global__ void __launch_bounds__(kHeadMostThreads, 1)
    dropout_head_tensor(const T* features, const T* weight, const T* bias, const int64_t* sample_ids,
                        T* gradient, float* value, DropoutHead job) {
  constexpr int kTiles = kClasses / 8, kClassTiles = (kClasses + 15) / 16;
  const int stride = head_row_stride(job.padded), samples = job.row.samples, passes = round_up(samples, 16);
  const int row_bytes = head_logit_bytes(samples, kClasses);
  T* const f = reinterpret_cast<T*>(shared_memory());                                   // [16][stride]
  T* const w = f + kHeadImages * stride;                                                // [kClasses][stride]
  unsigned char* const rows = reinterpret_cast<unsigned char*>(w + kClasses * stride);  // [16][row_bytes]
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp, quad = lane % 4, group = lane / 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kHeadImages;
  const auto id_of = [&](int image) {
    return static_cast<uint32_t>(sample_ids[first + image < job.images ? first + image : job.images - 1]);
  };
  stage_rows(f, features + first * job.units, job.images - first, kHeadImages, job.units, job.padded, stride);
  stage_rows(w, weight, job.row.classes, kClasses, job.units, job.padded, stride);
  sync_block();

  // logits of pass t: [16 images, units] times [units, classes], the first operand masked in registers
  const uint32_t id0 = id_of(group), id1 = id_of(group + 8);
  for (int t = warp; t < samples; t += warps) {
    float sum[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[j][i] = 0.f;
    for (int block = quad; block < job.padded / kUnitsPerBlock; block += 4) {
      const KeptSigns kept0 =
          kept_block(job.stream, static_cast<uint32_t>(block), static_cast<uint32_t>(t), id0);
      const KeptSigns kept1 =
          kept_block(job.stream, static_cast<uint32_t>(block), static_cast<uint32_t>(t), id1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int unit = block * kUnitsPerBlock + 4 * i;
        const uint2 f0 = *reinterpret_cast<const uint2*>(f + group * stride + unit);
        const uint2 f1 = *reinterpret_cast<const uint2*>(f + (group + 8) * stride + unit);
        const uint32_t a[4] = {
            f0.x & permute_bytes(kept0.w[i], 0, 0x9988), f1.x & permute_bytes(kept1.w[i], 0, 0x9988),
            f0.y & permute_bytes(kept0.w[i], 0, 0xBBAA), f1.y & permute_bytes(kept1.w[i], 0, 0xBBAA)};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint2 b = *reinterpret_cast<const uint2*>(w + (8 * j + group) * stride + unit);
          multiply_add<T>(sum[j], a, b.x, b.y);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 8 * j + 2 * quad + i % 2;
        float x = -infinity();
        if (c < job.row.classes) x = sum[j][i] * job.scale + (bias == nullptr ? 0.f : to_float(bias[c]));
        reinterpret_cast<float*>(rows + (group + i / 2 * 8) * row_bytes)[t * kClasses + c] = x;
      }
  }
  sync_block();

  const int together = kWarp / job.lanes;
  for (int start = warp * together; start < kHeadImages; start += warps * together) {
    const int image = start + lane / job.lanes;  // below 16: a team has at least two lanes
    const float result = head_row<T, kClasses>(rows + image * row_bytes, job, lane % job.lanes);
    if (lane % job.lanes == 0 && first + image < job.images) value[first + image] = result;
  }
  sync_block();

  // gradient of an image: H[classes, units] = slopes [classes, passes] times masks [passes, units], then the
  // sum over classes of W H. Column n of tile j is unit j of block 8 i + n.
  for (int image = warp; image < kHeadImages && first + image < job.images; image += warps) {
    const T* const slopes = reinterpret_cast<const T*>(rows + image * row_bytes);
    const uint32_t id = id_of(image);
    for (int start = 0; start < job.padded; start += kHeadUnits) {
      float h[kClassTiles][16][4];
#pragma unroll
      for (int m = 0; m < kClassTiles; ++m)
#pragma unroll
        for (int j = 0; j < 16; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) h[m][j][i] = 0.f;
      const uint32_t block = static_cast<uint32_t>(start / kUnitsPerBlock + group);
      for (int t = 2 * quad; t < passes; t += 16) {
        const uint32_t pass = static_cast<uint32_t>(t);
        const KeptSigns kept0 = kept_block(job.stream, block, pass, id),
                        kept1 = kept_block(job.stream, block, pass + 1, id),
                        kept8 = kept_block(job.stream, block, pass + 8, id),
                        kept9 = kept_block(job.stream, block, pass + 9, id);
        uint32_t a[kClassTiles][4];
#pragma unroll
        for (int m = 0; m < kClassTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int c = 16 * m + group + i % 2 * 8;
            a[m][i] =
                c < kClasses ? *reinterpret_cast<const uint32_t*>(slopes + c * passes + t + i / 2 * 8) : 0u;
          }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const uint32_t pick = 0xCC88u + 0x1111u * (j % 4);
          const uint32_t b0 = permute_bytes(kept0.w[j / 4], kept1.w[j / 4], pick) & One<T>::kPair;
          const uint32_t b1 = permute_bytes(kept8.w[j / 4], kept9.w[j / 4], pick) & One<T>::kPair;
#pragma unroll
          for (int m = 0; m < kClassTiles; ++m) multiply_add<T>(h[m][j], a[m], b0, b1);
        }
      }
      float out[32];  // [tile][column 2 quad + e], this lane's classes
#pragma unroll
      for (int i = 0; i < 32; ++i) out[i] = 0.f;
#pragma unroll
      for (int m = 0; m < kClassTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = 16 * m + group + 8 * half;
          if (16 * m + 8 * half >= kClasses) continue;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const T* const from = w + c * stride + start + (2 * quad + e) * kUnitsPerBlock;
#pragma unroll
            for (int j = 0; j < 16; ++j) out[2 * j + e] += to_float(from[j]) * h[m][j][2 * half + e];
          }
        }
      fold<16, 4>(out,
                  lane);  // over the lanes of equal quad: lane `group` keeps tiles 2 group and 2 group + 1
      T* const to = gradient + (first + image) * job.units;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int unit = start + (2 * quad + i % 2) * kUnitsPerBlock + 2 * group + i / 2;
        if (unit < job.units) to[unit] = from_float<T>(out[i] * job.scale);
      }
    }
  }
}

// Float32. A warp owns an image, a lane blocks of 16 units. A block of units takes 20 values in shared
// memory: the 16-byte reads of eight lanes then touch all banks.
constexpr int kDirectStride = 20;

TSYND_DEVICE void stage_blocks(float* to, const float* from, int rows, int64_t real_rows, int units,
                               int blocks, int thread, int threads) {
  for (int i = thread; i < rows * blocks * kUnitsPerBlock; i += threads) {
    const int row = i / (blocks * kUnitsPerBlock), unit = i % (blocks * kUnitsPerBlock);
    to[(row * blocks + unit / kUnitsPerBlock) * kDirectStride + unit % kUnitsPerBlock] =
        row < real_rows && unit < units ? from[static_cast<int64_t>(row) * units + unit] : 0.f;
  }
}

template <int kClasses>
__global__ void __launch_bounds__(kDirectWarps* kWarp, 1)
    dropout_head_direct(const float* features, const float* weight, const float* bias,
                        const int64_t* sample_ids, float* gradient, float* value, DropoutHead job) {
  constexpr int kTogether = kWarp / kClasses;  // passes at once: their sums are as many as a warp has lanes
  constexpr int kPasses = kHeadSlots / kClasses;
  const int blocks = (job.units + kUnitsPerBlock - 1) / kUnitsPerBlock, samples = job.row.samples,
            passes = round_up(samples, kTogether);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  float* const w = reinterpret_cast<float*>(shared_memory());       // [kClasses][blocks][20]
  float* const f = w + (kClasses + warp) * blocks * kDirectStride;  // [blocks][20]
  float* const logits = w + (kClasses + kDirectWarps) * blocks * kDirectStride + warp * passes * kClasses;
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kDirectWarps + warp;
  stage_blocks(w, weight, kClasses, job.row.classes, job.units, blocks, static_cast<int>(threadIdx.x),
               kDirectWarps * kWarp);
  const bool real = image < job.images;
  stage_blocks(f, features + (real ? image : 0) * job.units, 1, real, job.units, blocks, lane, kWarp);
  sync_block();
  if (!real) return;
  const uint32_t id = static_cast<uint32_t>(sample_ids[image]);

  for (int t = 0; t < samples; t += kTogether) {
    float sum[kTogether * kClasses];
#pragma unroll
    for (int i = 0; i < kTogether * kClasses; ++i) sum[i] = 0.f;
    for (int block = lane; block < blocks; block += kWarp) {
      KeptSigns signs[kTogether];
#pragma unroll
      for (int p = 0; p < kTogether; ++p)
        signs[p] = kept_block(job.stream, static_cast<uint32_t>(block), static_cast<uint32_t>(t + p), id);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 x = *reinterpret_cast<const float4*>(f + block * kDirectStride + 4 * i);
        float4 masked[kTogether];
#pragma unroll
        for (int p = 0; p < kTogether; ++p)
          masked[p] = float4{kept(signs[p].w[i], 0) ? x.x : 0.f, kept(signs[p].w[i], 1) ? x.y : 0.f,
                             kept(signs[p].w[i], 2) ? x.z : 0.f, kept(signs[p].w[i], 3) ? x.w : 0.f};
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const float4 y = *reinterpret_cast<const float4*>(w + (c * blocks + block) * kDirectStride + 4 * i);
#pragma unroll
          for (int p = 0; p < kTogether; ++p) {
            float& s = sum[p * kClasses + c];
            s += masked[p].x * y.x;
            s += masked[p].y * y.y;
            s += masked[p].z * y.z;
            s += masked[p].w * y.w;
          }
        }
      }
    }
    fold<kWarp / 2, 1>(sum, lane);  // lane l keeps value l
    const int c = lane % kClasses;
    float x = -infinity();
    if (c < job.row.classes) x = sum[0] * job.scale + (bias == nullptr ? 0.f : bias[c]);
    logits[t * kClasses + lane] = x;
  }
  sync_warp();

  float v[kPasses][kClasses], result = 0.f;
  if (job.row.multilabel) {
    result = multilabel_row<Math<float>, kClasses>(logits, job.row, lane, kWarp);
    sync_warp();
  }
#pragma unroll
  for (int g = 0; g < kPasses; ++g)
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const int t = g * kWarp + lane;
      v[g][c] = t < samples ? logits[t * kClasses + c] : 0.f;
      if (job.row.multilabel && c >= job.row.classes) v[g][c] = 0.f;
    }
  if (!job.row.multilabel) result = multiclass_row<Math<float>>(v, job.row, lane, kWarp);
  sync_warp();
  if (lane == 0) value[image] = result;
  // slopes in groups of kTogether passes, class by class: [t / kTogether][class][t % kTogether]
#pragma unroll
  for (int g = 0; g < kPasses; ++g)
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const int t = g * kWarp + lane;
      if (t < passes) logits[(t / kTogether * kClasses + c) * kTogether + t % kTogether] = v[g][c];
    }
  sync_warp();

  float* const to = gradient + image * job.units;
  for (int block = lane; block < blocks; block += kWarp) {
    float out[kUnitsPerBlock];
#pragma unroll
    for (int i = 0; i < kUnitsPerBlock; ++i) out[i] = 0.f;
    for (int t = 0; t < samples; t += kTogether) {
      KeptSigns signs[kTogether];
#pragma unroll
      for (int p = 0; p < kTogether; ++p)
        signs[p] = kept_block(job.stream, static_cast<uint32_t>(block), static_cast<uint32_t>(t + p), id);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float4 pulled[kTogether];
#pragma unroll
        for (int p = 0; p < kTogether; ++p) pulled[p] = float4{0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
        for (int c = 0; c < kClasses; ++c) {
          const float4 y = *reinterpret_cast<const float4*>(w + (c * blocks + block) * kDirectStride + 4 * i);
#pragma unroll
          for (int p = 0; p < kTogether; ++p) {
            const float slope = logits[(t / kTogether * kClasses + c) * kTogether + p];
            pulled[p].x += slope * y.x;
            pulled[p].y += slope * y.y;
            pulled[p].z += slope * y.z;
            pulled[p].w += slope * y.w;
          }
        }
#pragma unroll
        for (int p = 0; p < kTogether; ++p) {
          out[4 * i + 0] += kept(signs[p].w[i], 0) ? pulled[p].x : 0.f;
          out[4 * i + 1] += kept(signs[p].w[i], 1) ? pulled[p].y : 0.f;
          out[4 * i + 2] += kept(signs[p].w[i], 2) ? pulled[p].z : 0.f;
          out[4 * i + 3] += kept(signs[p].w[i], 3) ? pulled[p].w : 0.f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kUnitsPerBlock; ++i)
      if (block * kUnitsPerBlock + i < job.units) to[block * kUnitsPerBlock + i] = out[i] * job.scale;
  }
}

// The kernel that plan_dropout_head names, for a plan that is not `general`; `job` lacks padded and lanes
// only.
template <class T>
void run_dropout_head(Stream stream, const T* features, const T* weight, const T* bias,
                      const int64_t* sample_ids, T* gradient, float* value, DropoutHead job,
                      const DropoutHeadPlan& plan) {
  with_constant<8, 16, 32>(plan.classes, [&](auto classes) {
    constexpr int kClasses = decltype(classes)::value;
    if constexpr (std::is_same_v<T, float>) {
      launch(stream, dropout_head_direct<kClasses>, blocks_for(job.images, kDirectWarps),
             kDirectWarps * kWarp, plan.shared_bytes, features, weight, bias, sample_ids, gradient, value,
             job);
    } else {
      job.padded = round_up(job.units, kHeadUnits);
      job.lanes = 2;
      while (job.lanes * (kHeadSlots / kClasses) < round_up(job.row.samples, 16)) job.lanes *= 2;
      launch(stream, dropout_head_tensor<T, kClasses>, blocks_for(job.images, kHeadImages),
             plan.warps * kWarp, plan.shared_bytes, features, weight, bias, sample_ids, gradient, value, job);
    }
  });
}

}  // namespace tsynd
