// head_uncertainty in one kernel for narrow dtypes on sm_90a: the products by wgmma, features and weights
// brought by the bulk copy engine, weights to a whole cluster of blocks at once. Also serves up to 512
// columns T * C, twice what head_mma.cuh does.
#pragma once

#include "hopper.h"
#include "image_row.cuh"
#include "wgmma_head.h"

namespace tsynd {

constexpr int kWgmmaConsumers = 2 * kWarpgroupWarps;  // warps that multiply; the next one fetches
constexpr int kWgmmaThreads = (kWgmmaConsumers + kWarpgroupWarps) * kWarp;
constexpr int kTileRow = 2 * kFusedChunk;  // bytes of a row of a tile

struct WgmmaHead {
  int64_t images;
  int units, stages, cluster;
  RowTask row;
};

// 4 words of each lane of a quad, transposed: word i of lane q goes to lane i as its word q.
TSYND_DEVICE void transpose_quad(uint32_t (&x)[4], int quad) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if ((i & step) == 0) {
        const bool upper = quad & step;
        const uint32_t got = shuffle_xor(upper ? x[i] : x[i + step], step);
        x[i] = upper ? got : x[i];
        x[i + step] = upper ? x[i + step] : got;
      }
}

// The other half of an image's passes, which the thread in the same place of the other warpgroup has.
template <class M>
struct OtherHalf {
  static constexpr bool kWhole = false;
  float* mine;  // [2 kClasses][128] each
  const float* theirs;
  float* my_total;  // [128] each
  const float* their_total;
  float passes, their_passes;
  int thread;

  // From largest and sum of expm1(x - largest) over each half to those over both.
  template <int kClasses>
  __device__ __forceinline__ void merge(float (&top)[kClasses], float (&sum)[kClasses]) const {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      mine[2 * c * 128 + thread] = top[c];
      mine[(2 * c + 1) * 128 + thread] = sum[c];
    }
    sync_threads(kWgmmaConsumers * kWarp);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const float their_top = theirs[2 * c * 128 + thread], their_sum = theirs[(2 * c + 1) * 128 + thread];
      const float both = M::max(top[c], their_top), down = top[c] - both, their_down = their_top - both;
      sum[c] = (sum[c] * M::exp(down) + passes * M::expm1(down)) +
               (their_sum * M::exp(their_down) + their_passes * M::expm1(their_down));
      top[c] = both;
    }
  }
  __device__ __forceinline__ float total(float x) const {
    my_total[thread] = x;
    sync_threads(kWgmmaConsumers * kWarp);
    return x + their_total[thread];
  }
};

// A block has two warpgroups of 64 images and kColumns columns each: of 128 images and all columns, or, where
// kSplit, of the same 64 images and half of the columns each. One more warp fetches.
//
// Column n of the tile j = n / 8 is class j mod C of pass 8 (j / C) + n % 8, so that a lane of a quad has all
// classes of passes 2 q and 2 q + 1 of each eight, and a softmax takes no exchange. C is kClasses: rounded up
// to a power of two, at least 2. A box of weights is [kClasses][8] rows of [T, C, D]; its strides do not
// grow with the dimension, as in flash-attention's boxes of [batch, time, head, unit] tensors.
//
// Weights are read twice, the second time backwards, so that the last chunks of the first time are still
// there. A chunk lies in stage chunk % stages.
template <class T, int kColumns, int kClasses, bool kSplit>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_head(const __grid_constant__ TensorMap features, const __grid_constant__ TensorMap weight,
               const T* bias, T* gradient, float* value, WgmmaHead job) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = kColumns / 8, kPasses = kColumns / 4 / kClasses;
  constexpr int kBlockColumns = kSplit ? 2 * kColumns : kColumns, kRows = kSplit ? 64 : 128;
  constexpr int kColumnBytes = kBlockColumns * kTileRow, kRowBytes = kRows * kTileRow;  // of a stage
  unsigned char* const shared = shared_memory();
  const WgmmaShared at = wgmma_shared(kBlockColumns, job.stages);
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + at.barriers);
  uint64_t* const empty = full + job.stages;
  const int thread = static_cast<int>(threadIdx.x), warp = uniform_warp(), lane = thread % kWarp;
  const int chunks = (job.units + kFusedChunk - 1) / kFusedChunk;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  if (thread == 0) {
    if (shared_address(shared) % 1024 != 0) trap();
    for (int s = 0; s < job.stages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, kWgmmaConsumers * job.cluster);
    }
    publish_barriers();
  }
  sync_cluster();

  // 168 registers a thread at launch; the accumulators want more
  if (warp >= kWgmmaConsumers) {
    leave_registers<24>();
    constexpr int kBoxes = kBlockColumns / (8 * kClasses), kBoxBytes = kColumnBytes / kBoxes;
    const int rank = cluster_rank();
    uint32_t used = 0, phases = 0;  // a bit a stage
    const auto fetch = [&](int chunk, bool rows) {
      const int stage = chunk % job.stages;
      if (used >> stage & 1) {  // until all consumers of all blocks that this one sends to are done with it
        wait_barrier(empty + stage, phases >> stage & 1);
        phases ^= 1u << stage;
      }
      used |= 1u << stage;
      if (lane == 0) arrive_expecting(full + stage, kColumnBytes + (rows ? kRowBytes : 0));
      sync_warp();
      if (rows && lane < kRows / 64)
        load_box(shared + at.rows + stage * kRowBytes + lane * 64 * kTileRow, features, full + stage,
                 chunk * kFusedChunk, static_cast<int>(first) + lane * 64, 0);
      const int box = rank + lane * job.cluster;
      if (box < kBoxes) {
        unsigned char* const to = shared + stage * kColumnBytes + box * kBoxBytes;
        if (job.cluster == 1)
          load_box(to, weight, full + stage, chunk * kFusedChunk, 8 * box, 0);
        else
          load_box(to, weight, full + stage, chunk * kFusedChunk, 8 * box, 0,
                   static_cast<uint16_t>((1u << job.cluster) - 1));
      }
    };
    if (warp == kWgmmaConsumers) {
      for (int chunk = 0; chunk < chunks; ++chunk) fetch(chunk, true);
      for (int chunk = chunks - 1 - job.stages; chunk >= 0; --chunk) fetch(chunk, false);
    }
  } else {
    take_registers<240>();
    const int group = warp / kWarpgroupWarps, member = thread % (kWarpgroupWarps * kWarp), quad = lane % 4;
    uint32_t phases = 0;
    const auto arrived = [&](int stage) {
      wait_barrier(full + stage, phases >> stage & 1);
      phases ^= 1u << stage;
    };
    const auto release = [&](int stage) {
      if (lane < job.cluster) arrive_at(empty + stage, lane);
    };
    const uint64_t rows = tile_descriptor(shared + at.rows + (kSplit ? 0 : group * 64 * kTileRow)),
                   columns = tile_descriptor(shared + (kSplit ? group * kColumns * kTileRow : 0));

    // this thread's columns are those of its passes g, all classes
    const auto pass_of = [&](int g) {
      return (kSplit ? group * (kColumns / kClasses) : 0) + 8 * (g / 2) + 2 * quad + g % 2;
    };
    float s[kTiles][4];
    for (int chunk = 0, stage = 0; chunk < chunks; ++chunk) {
      arrived(stage);
      settle(s);
      product_fence();
#pragma unroll
      for (int k = 0; k < kFusedChunk / 16; ++k)
        multiply_tiles<T>(s, rows + descriptor_step(stage * kRowBytes + 32 * k),
                          columns + descriptor_step(stage * kColumnBytes + 32 * k), chunk + k > 0);
      commit_products();
      wait_products<1>();  // so the chunk before is done
      if (chunk > 0 && chunk - 1 + job.stages < chunks) release(stage == 0 ? job.stages - 1 : stage - 1);
      stage = stage == job.stages - 1 ? 0 : stage + 1;
    }
    wait_products<0>();
    settle(s);
    if (bias != nullptr)
#pragma unroll
      for (int g = 0; g < kPasses; ++g)
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          const bool real = c < job.row.classes && pass_of(g) < job.row.samples;
          const float more = real ? to_float(bias[pass_of(g) * job.row.classes + c]) : 0.f;
          s[g / 2 * kClasses + c][g % 2] += more;
          s[g / 2 * kClasses + c][2 + g % 2] += more;
        }
    settle(s);  // before the row arithmetic, which needs every register
    if (kSplit) sync_threads(kWgmmaConsumers * kWarp);  // features are read; their place is used anew

    const int64_t mine = first + (kSplit ? 0 : group * 64) + warp % kWarpgroupWarps * 16 + lane / 4;
    float* const exchange = reinterpret_cast<float*>(shared + at.rows);
    uint32_t slope[kTiles][2];  // dS, packed as the first operand of the second product
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[kPasses][kClasses];
#pragma unroll
      for (int g = 0; g < kPasses; ++g)
#pragma unroll
        for (int c = 0; c < kClasses; ++c)
          v[g][c] = c < job.row.classes ? s[g / 2 * kClasses + c][2 * half + g % 2] : -infinity();
      float result;
      if constexpr (kSplit) {
        const int before = kColumns / kClasses, after = job.row.samples - before;
        float* const totals = reinterpret_cast<float*>(shared + at.totals);
        const OtherHalf<Math<T>> other{exchange + group * 2 * kClasses * 128,
                                       exchange + (1 - group) * 2 * kClasses * 128,
                                       totals + group * 128,
                                       totals + (1 - group) * 128,
                                       static_cast<float>(group == 0 ? before : after),
                                       static_cast<float>(group == 0 ? after : before),
                                       member};
        result = multiclass_row<Math<T>>(v, job.row, 4, pass_of, other);
      } else {
        result = multiclass_row<Math<T>>(v, job.row, 4, pass_of);
      }
      if (quad == 0 && (!kSplit || group == 0) && mine + 8 * half < job.images)
        value[mine + 8 * half] = result;
#pragma unroll
      for (int g = 0; g < kPasses; g += 2)
#pragma unroll
        for (int c = 0; c < kClasses; ++c) slope[g / 2 * kClasses + c][half] = pack<T>(v[g][c], v[g + 1][c]);
    }

    const auto multiply = [&](float (&out)[8][4], int step) {
      const int stage = (chunks - 1 - step) % job.stages;
      if (step >= job.stages) arrived(stage);
      settle(out);
      product_fence();
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
        const uint32_t a[4] = {slope[2 * k][0], slope[2 * k][1], slope[2 * k + 1][0], slope[2 * k + 1][1]};
        multiply_slopes<T>(out, a, columns + descriptor_step(stage * kColumnBytes + k * 16 * kTileRow),
                           k > 0);
      }
      commit_products();
    };
    // 32 units from packed tiles: a lane of the quad gets 8 units side by side of each of its two rows
    const auto store = [&](uint32_t (&word)[2][4], int unit) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        transpose_quad(word[half], quad);
        const int64_t image = mine + 8 * half;
        if (image < job.images && unit + 8 * quad < job.units)
          *reinterpret_cast<uint4*>(gradient + image * job.units + unit + 8 * quad) =
              uint4{word[half][0], word[half][1], word[half][2], word[half][3]};
      }
    };
    // A chunk leaves its accumulators for `kept` or `word`; while the next one is multiplied, it is stored.
    // Where kSplit each warpgroup has a sum over its columns: it keeps 32 units and gives 32 away.
    float out[8][4], kept[4][4] = {};
    uint32_t word[2][2][4] = {};
    const auto take = [&](int step) {
      wait_products<0>();
      settle(out);
      if (step + job.stages < chunks) release((chunks - 1 - step) % job.stages);
      if constexpr (kSplit) {
        float4* const box = reinterpret_cast<float4*>(exchange) + ((step & 1) * 2 + group) * 4 * 128 + member;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 away{group == 0 ? out[j + 4][0] : out[j][0], group == 0 ? out[j + 4][1] : out[j][1],
                            group == 0 ? out[j + 4][2] : out[j][2], group == 0 ? out[j + 4][3] : out[j][3]};
          box[j * 128] = away;
#pragma unroll
          for (int i = 0; i < 4; ++i) kept[j][i] = group == 0 ? out[j][i] : out[j + 4][i];
        }
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            word[j / 4][half][j % 4] = pack<T>(out[j][2 * half], out[j][2 * half + 1]);
      }
    };
    const auto put = [&](int step) {
      const int unit = (chunks - 1 - step) * kFusedChunk;
      if constexpr (kSplit) {
        sync_threads(kWgmmaConsumers * kWarp);  // two boxes in turns: nobody reads what the next step writes
        const float4* const box =
            reinterpret_cast<const float4*>(exchange) + ((step & 1) * 2 + 1 - group) * 4 * 128 + member;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 got = box[j * 128];
          word[0][0][j] = pack<T>(kept[j][0] + got.x, kept[j][1] + got.y);
          word[0][1][j] = pack<T>(kept[j][2] + got.z, kept[j][3] + got.w);
        }
        store(word[0], unit + 32 * group);
      } else {
        store(word[0], unit);
        store(word[1], unit + 32);
      }
    };
    // The last put stands inside the loop: with code behind it ptxas gives these warps the 168 registers of
    // the launch instead of 240, and spills.
    for (int step = 0; step < chunks; ++step) {
      multiply(out, step);
      put(step - 1);  // of step -1 nothing: its units are beyond the last
      take(step);
      if (step == chunks - 1) put(step);
    }
  }
  sync_warp();
  sync_cluster();  // a precaution: all that is sent to a block it has waited for by now
#else
  __trap();
#endif
}

template <class T>
void run_wgmma_head(Stream stream, const T* features, const T* weight, const T* bias, T* gradient,
                    float* value, int64_t images, int64_t units, const RowTask& row, const HeadPlan& plan) {
  const uint64_t line = static_cast<uint64_t>(units) * sizeof(T),
                 samples = static_cast<uint64_t>(row.samples), classes = static_cast<uint64_t>(row.classes);
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  const BoxedTensor rows{features,
                         {static_cast<uint64_t>(units), static_cast<uint64_t>(images), 1},
                         {line, line},
                         {kFusedChunk, 64, 1},
                         kBFloat16};
  const BoxedTensor columns{weight,
                            {static_cast<uint64_t>(units), samples, classes},
                            {line * classes, line},
                            {kFusedChunk, 8, static_cast<uint32_t>(plan.classes)},
                            kBFloat16};
  const WgmmaHead job{images, static_cast<int>(units), plan.stages, plan.cluster, row};
  const int64_t blocks = blocks_for(blocks_for(images, plan.images), plan.cluster) * plan.cluster;
  const auto run = [&](auto kernel) {
    launch_clusters(stream, kernel, blocks, plan.cluster, kWgmmaThreads, plan.shared_bytes, tensor_map(rows),
                    tensor_map(columns), bias, gradient, value, job);
  };
  with_constant<2, 4, 8, 16>(plan.classes, [&](auto padded) {
    constexpr int kClasses = decltype(padded)::value;
    if (plan.columns == 512) return run(wgmma_head<T, 256, kClasses, true>);
    if (plan.columns == 256) return run(wgmma_head<T, 256, kClasses, false>);
    run(wgmma_head<T, 128, kClasses, false>);
  });
}

}  // namespace tsynd
