// Philox4x32-R (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the address of a
// dropout mask bit. Shared by host and device; everything is `static inline` so that translation units
// compiled for different instruction sets never share an out-of-line copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TSYND_HD static __host__ __device__ __forceinline__
#else
#define TSYND_HD static inline __attribute__((always_inline))
#endif

namespace tsynd {

constexpr int kMaskRounds = 7;      // fewest rounds that pass BigCrush
constexpr int kUnitsPerBlock = 16;  // one byte threshold per unit, 16 bytes per Philox call
constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t w[4];
};

TSYND_HD Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const uint64_t a = static_cast<uint64_t>(kPhiloxM0) * counter.w[0];
    const uint64_t b = static_cast<uint64_t>(kPhiloxM1) * counter.w[2];
    counter = Philox4{{static_cast<uint32_t>(b >> 32) ^ counter.w[1] ^ key0, static_cast<uint32_t>(b),
                       static_cast<uint32_t>(a >> 32) ^ counter.w[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return counter;
}

// Where the mask bits of one (sample, layer, seed) live: counter = (unit block, pass, layer, sample id).
// Never a thread, a batch position or a rank.
struct MaskAddress {
  uint32_t key0, key1, layer, sample;
};

TSYND_HD MaskAddress mask_address(int64_t seed, int64_t layer, int64_t sample_id) {
  const uint64_t key = static_cast<uint64_t>(seed);
  return MaskAddress{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32),
                     static_cast<uint32_t>(layer), static_cast<uint32_t>(sample_id)};
}

// Bit u of the result: unit 16 * block + u is kept in this pass. `keep` of 256 byte values are kept.
TSYND_HD uint32_t mask_block(MaskAddress at, uint32_t block, uint32_t pass, uint32_t keep) {
  const Philox4 words =
      philox4x32(Philox4{{block, pass, at.layer, at.sample}}, at.key0, at.key1, kMaskRounds);
  uint32_t bits = 0;
  for (int unit = 0; unit < kUnitsPerBlock; ++unit) {
    const uint32_t byte = (words.w[unit / 4] >> (8 * (unit % 4))) & 0xFFu;
    bits |= static_cast<uint32_t>(byte < keep) << unit;
  }
  return bits;
}

}  // namespace tsynd
