// Addressed dropout in memory: mask bytes, and the expansion of activations to T masked copies with its
// transpose.
#pragma once

#include "mask_bits.cuh"

namespace tsynd {

constexpr int kMaskThreads = 256;

// mask [passes, images, units]: a thread makes the 16 bytes of one unit block.
template <class Byte>
__global__ void __launch_bounds__(kMaskThreads)
    mask_bytes(Byte* mask, const int64_t* sample_ids, int64_t rows, int64_t images, int64_t units,
               MaskStream stream) {
  const int64_t blocks = (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  if (i >= rows * blocks) return;
  const int64_t row = i / blocks, block = i % blocks;
  const KeptSigns signs =
      kept_block(stream, static_cast<uint32_t>(block), static_cast<uint32_t>(row / images),
                 static_cast<uint32_t>(sample_ids[row % images]));
  Byte* const to = mask + row * units + block * kUnitsPerBlock;
  if (units % kUnitsPerBlock == 0) {
    uint4 bytes;
    bytes.x = (signs.w[0] >> 7) & 0x01010101u;
    bytes.y = (signs.w[1] >> 7) & 0x01010101u;
    bytes.z = (signs.w[2] >> 7) & 0x01010101u;
    bytes.w = (signs.w[3] >> 7) & 0x01010101u;
    *reinterpret_cast<uint4*>(to) = bytes;
    return;
  }
  for (int u = 0; u < kUnitsPerBlock; ++u)
    if (block * kUnitsPerBlock + u < units) to[u] = kept(signs.w[u / 4], u % 4);
}

// Activations [images, units, inner]; `inner` values share a unit's mask (channels of a map, say).
struct Expansion {
  int64_t images, units, inner;
  int first_pass, passes;
  bool expanded;  // the small side has its own copy for every pass already: [passes, images, ...]
  bool shared;    // one sample id for all images
  MaskStream stream;
  float scale;
};

TSYND_DEVICE int64_t expansion_blocks(const Expansion& job) {
  return (job.units + kUnitsPerBlock - 1) / kUnitsPerBlock;
}

// out [passes, images, units, inner] = masked and scaled copies. inner = 1: a thread per unit block and pass;
// otherwise a warp.
template <class T>
__global__ void __launch_bounds__(kMaskThreads)
    expand_passes(const T* input, T* out, const int64_t* sample_ids, Expansion job) {
  const int lanes = job.inner == 1 ? 1 : kWarp, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t blocks = expansion_blocks(job);
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x) / lanes;
  if (i >= job.passes * job.images * blocks) return;
  const int64_t row = i / blocks, block = i % blocks, image = row % job.images;
  const KeptSigns signs = kept_block(job.stream, static_cast<uint32_t>(block),
                                     static_cast<uint32_t>(job.first_pass + row / job.images),
                                     static_cast<uint32_t>(sample_ids[job.shared ? 0 : image]));
  const int64_t start = block * kUnitsPerBlock, size = job.units * job.inner;
  const T* const from = input + (job.expanded ? row : image) * size + start * job.inner;
  T* const to = out + row * size + start * job.inner;
#pragma unroll
  for (int u = 0; u < kUnitsPerBlock; ++u) {
    if (start + u >= job.units) break;
    const bool keep = kept(signs.w[u / 4], u % 4);
    for (int64_t k = lane; k < job.inner; k += lanes)
      to[u * job.inner + k] = from_float<T>(keep ? to_float(from[u * job.inner + k]) * job.scale : 0.f);
  }
}

// The transpose: in = sum over passes of masked gradients (expanded: each pass its own). T accumulates in
// float32 over the passes given; kAccumulate adds to a float32 result of earlier passes.
template <class T, class Out, bool kAccumulate>
__global__ void __launch_bounds__(kMaskThreads)
    gather_passes(const T* gradient, Out* in, const int64_t* sample_ids, Expansion job) {
  const int lanes = job.inner == 1 ? 1 : kWarp, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t blocks = expansion_blocks(job), size = job.units * job.inner;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x) / lanes;
  const int64_t rows = job.expanded ? job.passes * job.images : job.images;
  if (i >= rows * blocks) return;
  const int64_t row = i / blocks, block = i % blocks, image = row % job.images,
                start = block * kUnitsPerBlock;
  const uint32_t id = static_cast<uint32_t>(sample_ids[job.shared ? 0 : image]);
  const int begin = job.expanded ? static_cast<int>(row / job.images) : 0,
            end = job.expanded ? begin + 1 : job.passes;
  const int64_t last = (job.units - start < kUnitsPerBlock ? job.units - start : kUnitsPerBlock) * job.inner;
  Out* const to = in + row * size + start * job.inner;
  // 16 values a thread at a time, for which the masks of a pass are made once: one thread's units, or a
  // warp's sixteen stretches of one channel after another
  for (int64_t base = 0; base < last; base += static_cast<int64_t>(lanes) * kUnitsPerBlock) {
    float sum[kUnitsPerBlock];
    int unit[kUnitsPerBlock];
#pragma unroll
    for (int u = 0; u < kUnitsPerBlock; ++u) {
      const int64_t offset = base + u * lanes + lane;
      sum[u] = 0.f;
      unit[u] = lanes == 1 ? u : static_cast<int>((offset < last ? offset : last - 1) / job.inner);
    }
    for (int t = begin; t < end; ++t) {
      const KeptSigns signs =
          kept_block(job.stream, static_cast<uint32_t>(block), static_cast<uint32_t>(job.first_pass + t), id);
      const T* const from = gradient + (t * job.images + image) * size + start * job.inner + base + lane;
#pragma unroll
      for (int u = 0; u < kUnitsPerBlock; ++u) {
        const int at = lanes == 1 ? u : unit[u];
        const uint32_t word =
            at < 8 ? (at < 4 ? signs.w[0] : signs.w[1]) : (at < 12 ? signs.w[2] : signs.w[3]);
        if (base + u * lanes + lane < last && kept(word, at % 4)) sum[u] += to_float(from[u * lanes]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnitsPerBlock; ++u) {
      const int64_t offset = base + u * lanes + lane;
      if (offset >= last) continue;
      const float x = sum[u] * job.scale;
      to[offset] = kAccumulate ? from_float<Out>(to_float(to[offset]) + x) : from_float<Out>(x);
    }
  }
}

template <class T>
void run_expand(Stream stream, const T* input, T* out, const int64_t* sample_ids, const Expansion& job) {
  const int64_t teams = job.passes * job.images * ((job.units + kUnitsPerBlock - 1) / kUnitsPerBlock);
  launch(stream, expand_passes<T>, blocks_for(teams * (job.inner == 1 ? 1 : kWarp), kMaskThreads),
         kMaskThreads, 0, input, out, sample_ids, job);
}

template <class T, class Out, bool kAccumulate>
void run_gather(Stream stream, const T* gradient, Out* in, const int64_t* sample_ids, const Expansion& job) {
  const int64_t rows = job.expanded ? job.passes * job.images : job.images;
  const int64_t teams = rows * ((job.units + kUnitsPerBlock - 1) / kUnitsPerBlock);
  launch(stream, gather_passes<T, Out, kAccumulate>,
         blocks_for(teams * (job.inner == 1 ? 1 : kWarp), kMaskThreads), kMaskThreads, 0, gradient, in,
         sample_ids, job);
}

}  // namespace tsynd
