// Which kernel serves which shape on a GPU. Plain C++: the launchers, `_C.plan` and the kernel tests read the
// same page.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tsynd {

// What a launch may use; read from the device.
struct DeviceLimits {
  int64_t shared_bytes;  // of one block, after opting in
  int multiprocessors;
  int capability = 0;  // 90 where the build's sm_90a kernels run
};

constexpr int next_power_of_two(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

// From logits in memory: `registers` reads each logit once and needs no shared memory, `staged` keeps an
// image's logits in shared memory, `streamed` reads them three times. `none`: what even that keeps of an
// image, two values a pass and one a class, is more than a block's shared memory.
struct RowPlan {
  enum Kind { kRegisters, kStaged, kStreamed, kNone } kind;
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
  if (4 * floats <= limits.shared_bytes) return {RowPlan::kStreamed, 0, 0, 0, 4 * floats};
  return {RowPlan::kNone, 0, 0, 0, 0};
}

// The refusal of what no plan serves.
inline void refuse_rows(int64_t samples, int64_t classes, const DeviceLimits& limits) {
  throw std::invalid_argument("samples and classes: got " + std::to_string(samples) + " and " +
                              std::to_string(classes) + ", wanted 2 samples + classes of at most " +
                              std::to_string(limits.shared_bytes / 4 - kRowWarps) +
                              ", what a block of this GPU can keep of an image");
}

// Images worked on at once where each has `each` values of scratch in memory.
constexpr int64_t kMostScratch = int64_t{1} << 28;  // elements
constexpr int64_t images_at_once(int64_t images, int64_t each) {
  const int64_t most = kMostScratch / each < 1 ? 1 : kMostScratch / each;
  return images < most ? images : most;
}

// head_uncertainty: product, rows, product; or one kernel, by mma.sync or by sm_90a's wgmma.
struct HeadPlan {
  enum Kind { kRows, kFused, kWgmma } kind;
  int images, columns, classes;  // of a block; C rounded up to a power of two
  int stages, cluster;           // cluster: blocks that share weights
  int64_t shared_bytes;
};

constexpr int kFusedMostColumns = 256;
constexpr int kFusedChunk = 64;
constexpr int kWgmmaMostColumns = 512;
constexpr int kWgmmaMostStages = 8;

// Shared memory of wgmma_head: weights from 0, features, room for one float a thread, barriers. The place of
// the features serves the two halves of an image as exchange once they are read.
struct WgmmaShared {
  int rows, totals, barriers, bytes;
};
constexpr WgmmaShared wgmma_shared(int columns, int stages) {
  const bool split = columns > 256;
  const int rows = stages * columns * 128, features = stages * (split ? 64 : 128) * 128;
  const int totals = rows + (split && features < 32 * 1024 ? 32 * 1024 : features);
  const int barriers = totals + (split ? 1024 : 0);
  return {rows, totals, barriers, barriers + stages * 2 * 8};
}

// The best kernel that head_uncertainty may take: kFused, for wgmma_head has never run on a GPU, unless the
// variable TSYND_CUDA_HEAD=wgmma|fused|rows, read at every call, says otherwise. Shapes it does not serve get
// the next.
inline HeadPlan::Kind parse_head_kernel(const char* name) {
  const std::string wanted = name == nullptr || *name == '\0' ? "fused" : name;
  if (wanted == "wgmma") return HeadPlan::kWgmma;
  if (wanted == "fused") return HeadPlan::kFused;
  if (wanted == "rows") return HeadPlan::kRows;
  throw std::invalid_argument("TSYND_CUDA_HEAD: got '" + wanted + "', wanted 'wgmma', 'fused' or 'rows'");
}
inline HeadPlan::Kind best_head_kernel() { return parse_head_kernel(std::getenv("TSYND_CUDA_HEAD")); }

// `narrow`: float16 or bfloat16. `aligned`: rows of features and weights start on 16 bytes.
inline HeadPlan plan_head(int64_t images, int64_t units, int64_t classes, int64_t samples, bool multilabel,
                          bool narrow, bool aligned, const DeviceLimits& limits, HeadPlan::Kind best) {
  const HeadPlan general{HeadPlan::kRows, 0, 0, 0, 0, 0, 0};
  if (!narrow || !aligned || multilabel || units % 8 != 0 || classes > 16 || units > (1 << 24))
    return general;
  const int padded = next_power_of_two(classes < 2 ? 2 : classes);
  if (best == HeadPlan::kWgmma && limits.capability == 90 && images < (1ll << 31) - 1024) {
    // a quad's lanes own whole passes of each eight
    const int64_t needed = (samples + 7) / 8 * 8 * padded, chunks = (units + kFusedChunk - 1) / kFusedChunk;
    const int columns = needed <= 128 ? 128 : needed <= 256 ? 256 : kWgmmaMostColumns;
    const int rows = columns == kWgmmaMostColumns ? 64 : 128;
    // as many blocks share weights as keep L2 from being the limit, see docs/kernels.md
    int cluster = columns == kWgmmaMostColumns ? 4 : 2;
    while (cluster > 1 && (cluster - 1) * rows >= images) cluster /= 2;
    const int most = static_cast<int>(chunks < kWgmmaMostStages ? chunks : kWgmmaMostStages);
    for (int stages = most; needed <= columns && stages >= (most < 2 ? most : 2); --stages) {
      const int64_t bytes = wgmma_shared(columns, stages).bytes;
      if (bytes <= limits.shared_bytes)
        return {HeadPlan::kWgmma, rows, columns, padded, stages, cluster, bytes};
    }
  }
  const int64_t passes = (samples + 3) / 4 * 4;  // a quad's lanes own whole passes
  if (best == HeadPlan::kRows || passes * padded > kFusedMostColumns) return general;
  const int columns = passes * padded <= 128 ? 128 : 256;
  // small batches: half as many images a block, so that more multiprocessors take part
  const int rows = images >= 128ll * limits.multiprocessors ? 128 : 64;
  for (int stages = 3; stages >= 2; --stages) {
    const int64_t bytes = static_cast<int64_t>(stages) * (rows + columns) * kFusedChunk * 2;
    if (bytes <= limits.shared_bytes) return {HeadPlan::kFused, rows, columns, padded, stages, 1, bytes};
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

// expected_information: `images` at a time against `columns` of the targets' outcomes at a time.
struct InformationPlan {
  int64_t images, columns;
  int64_t shared_bytes;  // of a block that finds an image's ratios: two values a pass, one a class
};

constexpr int64_t kInformationColumns = 8192;
constexpr int64_t kMostJoint = int64_t{1} << 26;  // joint probabilities in memory at once

inline InformationPlan plan_information(int64_t images, int64_t targets, int64_t classes, int64_t samples,
                                        bool multilabel, const DeviceLimits& limits) {
  const int64_t shared = multilabel ? 0 : 4 * (2 * samples + classes);
  if (shared > limits.shared_bytes) refuse_rows(samples, classes, limits);
  const int64_t outcomes = multilabel ? 2 : classes, all = targets * outcomes,
                columns = all < kInformationColumns ? all : kInformationColumns;
  const int64_t by_joint = kMostJoint / (columns * outcomes) < 1 ? 1 : kMostJoint / (columns * outcomes);
  const int64_t by_scratch = images_at_once(images, 2 * samples * (multilabel ? 2 * classes : classes));
  return {by_joint < by_scratch ? by_joint : by_scratch, columns, shared};
}

}  // namespace tsynd
