// The arithmetic of the CPU operators, built once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "../uncertainty.h"

namespace tsynd {

// A tile of logits: `lanes` images side by side, element (t, c, image) at (t * classes + c) * stride + image.
struct UncertaintyTile {
  float* logits;      // in: logits; out: gradient
  int64_t stride;     // floats between consecutive (t, c), at least kernels().lanes
  const float* bias;  // [samples * classes] added to the logits, or null
  int64_t samples, classes;
  Objective objective;
  Task task;
  float* value;    // [lanes]
  float* scratch;  // uncertainty_scratch(samples, classes) floats, 64-byte aligned
};

// `images` neighbouring images of logits [T, B, C] as they lie in memory. `bf16` tells the element type of
// both.
struct LogitsTile {
  const void* logits;   // of the first image in the first pass
  void* gradient;       // likewise
  int64_t pass_stride;  // elements from one pass to the next, B * C
  int64_t images;       // 1 .. lanes
  int64_t samples, classes;
  Objective objective;
  Task task;
  bool bf16;
  float* value;    // [lanes]
  float* scratch;  // logits_scratch(samples, classes) floats, 64-byte aligned
};

// Posterior samples of `images` neighbouring images as ratios to their means. Outcomes are the classes of a
// multiclass task (one group), or 1 and 0 of each label (a group each).
struct RatiosTile {
  const float* logits;  // of the first image in the first pass
  int64_t pass_stride;  // floats from one pass to the next
  int64_t images;       // 1 .. lanes
  int64_t samples, classes;
  Task task;
  float* ratio;    // out [groups][samples][stride]: p / mean - 1 of image i, outcome k at i * outcomes + k
  float* mean;     // out [groups][stride]
  float* p;        // out as ratio, or null
  int64_t stride;  // floats from one pass to the next of `ratio` and `p`
  float* scratch;  // ratios_scratch(samples, classes) floats, 64-byte aligned
};

// Rows of an image's outcomes against columns of targets' outcomes.
struct InformationTile {
  float* joint;  // [rows][columns] in: sum over passes of ratio times ratio; out: log(1 + d)
  int64_t rows, columns;
  float scale;             // 1 / passes, which makes the sum d
  const float* mean;       // [columns], the targets' mean probabilities
  float *excess, *gained;  // [rows] += sum of mean (log(1 + d) - d), and of mean ((1 + d) log(1 + d) - d)
};

// A tile of images through an independently masked linear head.
struct DropoutHeadTile {
  const float* features;  // [lanes][padded units], zero beyond the units and beyond `images`
  const float* weight;    // [classes][padded units]
  const float* bias;      // [classes] or null
  int64_t images;         // 1 .. lanes
  int64_t blocks;         // padded units / 16
  uint32_t keep;          // of 256
  int64_t seed, layer;
  const int64_t* sample_ids;  // [images]
  int64_t samples, classes;
  Objective objective;
  Task task;
  float* value;              // [lanes]
  float* features_gradient;  // [lanes][padded units]
  float* scratch;            // dropout_head_scratch(...) floats, 64-byte aligned
};

enum class AscentRule : int { kL2 = 0, kLinf = 1 };

// One image's latent: z <- project(z + step * direction). `bf16` tells the element type of all three arrays.
struct AscentRow {
  void* latent;
  const void* gradient;
  const void* origin;
  int64_t count;
  float step, radius;
  AscentRule rule;
  bool bf16;
};

struct Kernels {
  const char* isa;
  int lanes;
  void (*uncertainty)(const UncertaintyTile&);
  void (*logits)(const LogitsTile&);
  void (*ratios)(const RatiosTile&);
  void (*information)(const InformationTile&);
  void (*dropout_head)(const DropoutHeadTile&);
  // out[u] = kept ? x[u] * scale : 0 for `blocks` blocks of 16 units of one (sample, pass)
  void (*masked_copy)(const float* x, float* out, int64_t blocks, uint32_t pass, uint32_t keep,
                      MaskAddress at);
  // out[u] += kept ? x[u] * scale : 0
  void (*masked_add)(const float* x, float* out, int64_t blocks, uint32_t pass, uint32_t keep,
                     MaskAddress at);
  void (*mask_bytes)(uint8_t* out, int64_t units, uint32_t pass, uint32_t keep, MaskAddress at);
  void (*ascend)(const AscentRow&);
};

constexpr int kMaxLanes = 16;

constexpr int64_t uncertainty_scratch(int64_t samples, int64_t classes) {
  return (samples + 2) * classes * kMaxLanes;
}

constexpr int64_t logits_scratch(int64_t samples, int64_t classes) {
  return samples * classes * kMaxLanes + uncertainty_scratch(samples, classes);
}

// log-probabilities of every pass and outcome, one pass' probabilities, the means
constexpr int64_t ratios_scratch(int64_t samples, int64_t classes) {
  return (samples + 2) * 2 * classes * kMaxLanes;
}

// logits tile + one image's logits + its mask bits (two bytes a block, rounded up to whole vectors)
constexpr int64_t dropout_head_scratch(int64_t samples, int64_t classes, int64_t blocks) {
  const int64_t bits = kMaxLanes * samples * ((blocks + kMaxLanes - 1) / kMaxLanes * kMaxLanes) / 2;
  return uncertainty_scratch(samples, classes) + samples * classes * (kMaxLanes + 1) + bits + 64;
}

// The best kernels this processor can run; the variable TSYND_ISA=generic|avx2|avx512 picks lesser ones.
__attribute__((visibility("default"))) const Kernels& kernels();

namespace generic {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace tsynd
