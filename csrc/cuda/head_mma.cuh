// head_uncertainty in one kernel for narrow dtypes: S = F W^T in registers over tensor cores, the row
// arithmetic on the accumulators, then dF = dS W with dS straight from the registers. The logits never reach
// device memory.
#pragma once

#include "image_row.cuh"

namespace tsynd {

constexpr int kFusedUnits = kFusedChunk;  // of D per pipeline step: a 128-byte row of shared memory
constexpr int kFusedRowsPerWarp = 16;
constexpr int kFusedMostThreads = 8 * kWarp;

struct FusedHead {
  int64_t images;
  int units, stages;
  RowTask row;
};

// Rows of 128 bytes as eight 16-byte pieces, placed so that the eight rows that one ldmatrix reads at the
// same piece lie in different banks.
TSYND_DEVICE int swizzled(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

// Columns are ordered so that a lane of a quad owns whole passes of the accumulators: column n = 8 j + 2 q +
// e, in the n8 tile j of lane q, is class 2 (j mod C/2) + e of pass 4 (j / (C/2)) + q. With classes side by
// side a softmax would take exchanges among the quad, eight per pass; so it takes none.
template <int kClasses>
TSYND_DEVICE int column_pass(int n) {
  return 4 * ((n / 8) / (kClasses / 2)) + (n % 8) / 2;
}
template <int kClasses>
TSYND_DEVICE int column_class(int n) {
  return 2 * ((n / 8) % (kClasses / 2)) + n % 2;
}

// One block: 16 images a warp, all kColumns >= T * C columns. kClasses is C rounded up to a power of two, at
// least 2.
template <class T, int kColumns, int kClasses>
__global__ void __launch_bounds__(kFusedMostThreads, 1)
    fused_head(const T* features, const T* weight, const T* bias, T* gradient, float* value, FusedHead job) {
  constexpr int kTiles = kColumns / 8, kPasses = kColumns / 4 / kClasses;
  const int threads = static_cast<int>(blockDim.x), block_rows = threads / kWarp * kFusedRowsPerWarp;
  const int stage_size = (block_rows + kColumns) * kFusedUnits;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp,
            quad = lane % 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block_rows;
  const int chunks = (job.units + kFusedUnits - 1) / kFusedUnits;

  // steps below `chunks` need features and weights, the rest weights alone
  const auto fetch = [&](int step) {
    if (step < 2 * chunks) {
      T* const tile = shared + (step % job.stages) * stage_size;
      const int from = (step < chunks ? step : step - chunks) * kFusedUnits;
      if (step < chunks)
        for (int i = thread; i < block_rows * 8; i += threads) {
          const int row = i / 8, unit = from + i % 8 * 8;
          const bool real = first + row < job.images && unit < job.units;
          copy_async(tile + swizzled(row, i % 8) * 8,
                     features + (real ? (first + row) * job.units + unit : 0), real);
        }
      for (int i = thread; i < kColumns * 8; i += threads) {
        const int n = i / 8, unit = from + i % 8 * 8, t = column_pass<kClasses>(n),
                  c = column_class<kClasses>(n);
        const bool real = t < job.row.samples && c < job.row.classes && unit < job.units;
        const int64_t offset = real ? (static_cast<int64_t>(t) * job.row.classes + c) * job.units + unit : 0;
        copy_async(tile + (block_rows * 8 + swizzled(n, i % 8)) * 8, weight + offset, real);
      }
    }
    commit_copies();  // an empty group keeps the count
  };
  // Stage of `step` has arrived everywhere, and the stage before it is free again. Two or three stages.
  const auto arrive = [&](int step) {
    if (job.stages == 3)
      wait_copies<1>();
    else
      wait_copies<0>();
    sync_block();
    fetch(step + job.stages - 1);
  };
  for (int step = 0; step < job.stages - 1; ++step) fetch(step);

  float s[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0.f;
  for (int step = 0; step < chunks; ++step) {
    arrive(step);
    const T* const rows = shared + (step % job.stages) * stage_size;
    const T* const columns = rows + block_rows * kFusedUnits;
#pragma unroll 1
    for (int k = 0; k < kFusedUnits / 16; ++k) {
      uint32_t a[4];
      load_matrices(a, rows + swizzled(warp * 16 + lane % 16, 2 * k + lane / 16) * 8);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];
        load_matrices(b, columns + swizzled(8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2) * 8);
        multiply_add<T>(s[j], a, b[0], b[1]);
        multiply_add<T>(s[j + 1], a, b[2], b[3]);
      }
    }
  }

  uint32_t slope[kTiles][2];  // dS, packed as the first operand of the second product
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float v[kPasses][kClasses];
#pragma unroll
    for (int g = 0; g < kPasses; ++g)
#pragma unroll
      for (int c = 0; c < kClasses; ++c) {
        const int t = 4 * g + quad;
        const bool real = c < job.row.classes;
        v[g][c] = s[g * (kClasses / 2) + c / 2][2 * half + c % 2];
        if (bias != nullptr && real && t < job.row.samples)
          v[g][c] += to_float(bias[t * job.row.classes + c]);
        v[g][c] = real ? v[g][c] : -infinity();
      }
    const float result = multiclass_row<Math<T>>(v, job.row, quad, 4);
    const int64_t image = first + warp * 16 + half * 8 + lane / 4;
    if (quad == 0 && image < job.images) value[image] = result;
#pragma unroll
    for (int g = 0; g < kPasses; ++g)
#pragma unroll
      for (int c = 0; c < kClasses; c += 2)
        slope[g * (kClasses / 2) + c / 2][half] = pack<T>(v[g][c], v[g][c + 1]);
  }

  for (int step = chunks; step < 2 * chunks; ++step) {
    arrive(step);
    T* const rows = shared + (step % job.stages) * stage_size;
    const T* const columns = rows + block_rows * kFusedUnits;
    float out[kFusedUnits / 8][4];
#pragma unroll
    for (int j = 0; j < kFusedUnits / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] = 0.f;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const uint32_t a[4] = {slope[2 * k][0], slope[2 * k][1], slope[2 * k + 1][0], slope[2 * k + 1][1]};
#pragma unroll
      for (int j = 0; j < kFusedUnits / 8; j += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, columns + swizzled(16 * k + lane % 16, j + lane / 16) * 8);
        multiply_add<T>(out[j], a, b[0], b[1]);
        multiply_add<T>(out[j + 1], a, b[2], b[3]);
      }
    }
    // through this warp's own rows of the stage, which no copy fills any more, so that whole lines go out
    sync_warp();
#pragma unroll
    for (int j = 0; j < kFusedUnits / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(rows + swizzled(warp * 16 + half * 8 + lane / 4, j) * 8 + 2 * quad) =
            pack<T>(out[j][2 * half], out[j][2 * half + 1]);
    sync_warp();
#pragma unroll
    for (int i = lane; i < kFusedRowsPerWarp * 8; i += kWarp) {
      const int row = warp * 16 + i / 8, unit = (step - chunks) * kFusedUnits + i % 8 * 8;
      if (first + row < job.images && unit < job.units)
        *reinterpret_cast<uint4*>(gradient + (first + row) * job.units + unit) =
            *reinterpret_cast<const uint4*>(rows + swizzled(row, i % 8) * 8);
    }
  }
}

// The kernel that plan_head names, for a plan of kind kFused.
template <class T>
void run_fused_head(Stream stream, const T* features, const T* weight, const T* bias, T* gradient,
                    float* value, int64_t images, int64_t units, const RowTask& row, const HeadPlan& plan) {
  const FusedHead job{images, static_cast<int>(units), plan.stages, row};
  with_constant<2, 4, 8, 16>(plan.classes, [&](auto classes) {
    with_constant<128, 256>(plan.columns, [&](auto columns) {
      launch(stream, fused_head<T, decltype(columns)::value, decltype(classes)::value>,
             blocks_for(images, plan.images), plan.images / kFusedRowsPerWarp * kWarp, plan.shared_bytes,
             features, weight, bias, gradient, value, job);
    });
  });
}

}  // namespace tsynd
