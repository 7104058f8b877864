// Which kernel serves which shape on a GPU. Plain C++: the launchers, `_C.plan` and the kernel tests read the
// same page.
#pragma once

#include <cstdint>

namespace tsynd {

// What a launch may use; read from the device.
struct DeviceLimits {
  int64_t shared_bytes;  // of one block, after opting in
  int multiprocessors;
};

constexpr int next_power_of_two(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

// From logits in memory: `registers` reads each logit once and needs no shared memory, `staged` keeps an
// image's logits in shared memory, `streamed` reads them three times.
struct RowPlan {
  enum Kind { kRegisters, kStaged, kStreamed } kind;
  int lanes;    // of a warp that share an image (kRegisters)
  int classes;  // C rounded up to a power of two (kRegisters)
  int slots;    // logits in a lane's registers (kRegisters)
  int64_t shared_bytes;
};

constexpr int kRowWarps = 8;                    // of a block_rows block
constexpr int64_t kRowStagedBytes = 96 * 1024;  // two blocks a multiprocessor

inline RowPlan plan_rows(int64_t samples, int64_t classes, bool multilabel, const DeviceLimits& limits) {
  const int padded = classes <= 32 ? next_power_of_two(classes < 2 ? 2 : classes) : 64;
  if (padded <= 32 && !multilabel)
    for (int lanes = 4; lanes <= 32; lanes *= 2)  // few lanes with many logits each exchange least
      for (const int slots : {16, 64})
        if (static_cast<int64_t>(lanes) * (slots / padded) >= samples)
          return {RowPlan::kRegisters, lanes, padded, slots, 0};
  const int64_t floats = 2 * samples + classes + kRowWarps, staged = 4 * (floats + samples * classes);
  const int64_t most = limits.shared_bytes < kRowStagedBytes ? limits.shared_bytes : kRowStagedBytes;
  if (staged <= most) return {RowPlan::kStaged, 0, 0, 0, staged};
  return {RowPlan::kStreamed, 0, 0, 0, 4 * floats};
}

// head_uncertainty: one fused kernel, or product, rows, product.
struct HeadPlan {
  bool fused;
  int warps, columns, classes, stages;
  int64_t shared_bytes;
};

constexpr int kFusedMostColumns = 256;
constexpr int kFusedChunk = 64;

// `narrow`: float16 or bfloat16. `aligned`: rows of features and weights start on 16 bytes.
inline HeadPlan plan_head(int64_t images, int64_t units, int64_t classes, int64_t samples, bool multilabel,
                          bool narrow, bool aligned, const DeviceLimits& limits) {
  const HeadPlan general{false, 0, 0, 0, 0, 0};
  if (!narrow || !aligned || multilabel || units % 8 != 0 || classes > 16 || units > (1 << 24))
    return general;
  const int padded = next_power_of_two(classes < 2 ? 2 : classes);
  const int64_t passes = (samples + 3) / 4 * 4;  // a quad's lanes own whole passes
  if (passes * padded > kFusedMostColumns) return general;
  const int columns = passes * padded <= 128 ? 128 : 256;
  // small batches: half as many images a block, so that more multiprocessors take part
  const int warps = images >= 128ll * limits.multiprocessors ? 8 : 4;
  for (int stages = 3; stages >= 2; --stages) {
    const int64_t bytes = static_cast<int64_t>(stages) * (warps * 16 + columns) * kFusedChunk * 2;
    if (bytes <= limits.shared_bytes) return {true, warps, columns, padded, stages, bytes};
  }
  return general;
}

// dropout_head_uncertainty: `tensor` (narrow dtypes) and `direct` (float32) make masks in registers;
// `general` expands a few passes at a time in memory.
struct DropoutHeadPlan {
  enum Kind { kTensor, kDirect, kGeneral } kind;
  int warps, classes;
  int64_t shared_bytes;
};

inline DropoutHeadPlan plan_dropout_head(int64_t units, int64_t classes, int64_t samples, bool narrow,
                                         const DeviceLimits& limits) {
  const DropoutHeadPlan general{DropoutHeadPlan::kGeneral, 0, 0, 0};
  if (classes > 32 || units > 65536) return general;
  const int padded = classes <= 8 ? 8 : next_power_of_two(classes);
  if (narrow) {
    const int64_t all = (samples + 15) / 16 * 16;
    if (all * padded > 32 * 64) return general;  // a warp's registers in the row arithmetic
    const int64_t stride = (units + 127) / 128 * 128 + 4;
    const int64_t logits = samples * padded * 4, slopes = padded * all * 2;
    const int64_t bytes = (16 + padded) * stride * 2 + 16 * (logits > slopes ? logits : slopes);
    if (bytes > limits.shared_bytes) return general;
    // large blocks fill a multiprocessor alone, so they bring more warps
    return {DropoutHeadPlan::kTensor, bytes > 56 * 1024 ? 8 : 4, padded, bytes};
  }
  const int64_t together = 32 / padded, passes = (samples + together - 1) / together * together;
  if (passes * padded > 32 * 64) return general;
  const int64_t bytes = 4 * ((padded + 8) * ((units + 15) / 16) * 20 + 8 * passes * padded);
  if (bytes > limits.shared_bytes) return general;
  return {DropoutHeadPlan::kDirect, 8, padded, bytes};
}

}  // namespace tsynd
