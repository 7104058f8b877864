// Mask bits in registers: 16 units per Philox call, compared a word of four bytes at a time.
#pragma once

#include "device.h"

namespace tsynd {

// `byte < keep` for the four bytes of a word at once; keep in 1 .. 256.
struct KeepTest {
  uint32_t low, small, all;
};

TSYND_HD KeepTest keep_test(uint32_t keep) {
  return KeepTest{(keep & 0x7Fu) * 0x01010101u, keep < 128u ? 0xFFFFFFFFu : 0u,
                  keep > 255u ? 0xFFFFFFFFu : 0u};
}

// The sign bit of each byte of the result tells whether that byte's unit is kept; the other bits are noise.
TSYND_HD uint32_t kept_signs(uint32_t word, const KeepTest& test) {
  const uint32_t at_least = (word | 0x80808080u) - test.low;  // sign: the low seven bits reach those of keep
  return ~((word & at_least) | ((word | at_least) & test.small)) | test.all;
}

TSYND_HD bool kept(uint32_t signs, int byte) { return (signs >> (8 * byte + 7)) & 1u; }

struct MaskStream {
  uint32_t key0, key1, layer;
  KeepTest test;
};

struct KeptSigns {
  uint32_t w[4];  // of units 16 block + 4 i .. + 3 in w[i]
};

TSYND_HD KeptSigns kept_block(const MaskStream& stream, uint32_t block, uint32_t pass, uint32_t sample) {
  const Philox4 words =
      philox4x32(Philox4{{block, pass, stream.layer, sample}}, stream.key0, stream.key1, kMaskRounds);
  KeptSigns out;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) out.w[i] = kept_signs(words.w[i], stream.test);
  return out;
}

}  // namespace tsynd
