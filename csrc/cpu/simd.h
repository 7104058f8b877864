// Vector arithmetic with GCC/Clang vector extensions: one source, as many lanes as the including
// translation unit is compiled for. Include only from the kernels_*.cpp files, which define
// TSYND_ISA (a namespace) and TSYND_LANES. No standard-library templates here: an inline function shared
// between translation units built for different instruction sets may be linked from the wrong one.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../uncertainty.h"

namespace tsynd::TSYND_ISA {

constexpr int kLanes = TSYND_LANES;
typedef float VFloat __attribute__((vector_size(4 * TSYND_LANES)));
typedef int32_t VInt __attribute__((vector_size(4 * TSYND_LANES)));
typedef uint32_t VUint __attribute__((vector_size(4 * TSYND_LANES)));
typedef float VFloatUnaligned __attribute__((vector_size(4 * TSYND_LANES), aligned(4)));

TSYND_HD VFloat splat(float x) { return x - VFloat{}; }
TSYND_HD VFloat load(const float* from) { return *reinterpret_cast<const VFloatUnaligned*>(from); }
TSYND_HD void store(float* to, VFloat x) { *reinterpret_cast<VFloatUnaligned*>(to) = x; }

struct VMath {
  using V = VFloat;
  TSYND_HD V splat(float x) { return TSYND_ISA::splat(x); }
  TSYND_HD VInt less(V a, V b) { return a < b; }
  TSYND_HD V select(VInt mask, V a, V b) { return mask ? a : b; }
  // a where a is NaN, as the instructions do it
  TSYND_HD V max(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)b, (__m256)a);
#else
    return a < b ? b : a;
#endif
  }

  // exp(x) = scale + scale * e1 with e1 = expm1 of the reduced argument; for x <= 0. Cephes' polynomial.
  struct Exponential {
    V scale, e1;
  };

  TSYND_HD Exponential reduce(V x) {
    const V magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const V clamped = max(x, splat(-87.33f));
    const V shifted = clamped * 1.44269504088896341f + magic;
    const V n = shifted - magic;
    const V r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    const VInt exponent = ((VInt)shifted - (VInt)magic + 127) << 23;
    return {(VFloat)exponent, y * (r * r) + r};
  }

  // exp for x <= 0, about 1 ulp; below -87.3 (a denormal result) it is 0.
  TSYND_HD V exp(V x) {
    const Exponential e = reduce(x);
    return x < splat(-87.33f) ? splat(0.f) : e.scale + e.scale * e.e1;
  }

  // exp(x) - 1 for x <= 0, about 1 ulp.
  TSYND_HD V expm1(V x) {
    const Exponential e = reduce(x);
    return (e.scale - 1.f) + e.scale * e.e1;
  }

  // log for normal positive x, about 1 ulp; NaN stays NaN. Cephes' polynomial.
  TSYND_HD V log(V x) {
    const VInt bits = (VInt)x;
    // mantissa in [sqrt(1/2), sqrt(2)): shift the exponent boundary to sqrt(1/2)
    const VInt offset = bits - 0x3F3504F3;
    const VInt exponent = offset >> 23;
    const V e = __builtin_convertvector(exponent, VFloat);
    const V m = (VFloat)(bits - (exponent << 23)) - 1.f;
    V y = m * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    const V square = m * m;
    y = y * m * square + e * -2.12194440e-4f - 0.5f * square;
    const V result = m + y + e * 0.693359375f;
    return x == x ? result : x;
  }

  // log(1 + x) for x > -1: log of the rounded sum, corrected by what the rounding lost.
  TSYND_HD V log1p(V x) {
    const V sum = x + 1.f;
    return log(sum) + (x - (sum - 1.f)) / sum;
  }
};

// 32 x 32 -> 64 bit products of a vector with a constant.
TSYND_HD void multiply_wide(VUint a, uint32_t factor, VUint& high, VUint& low) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, k = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32(x, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), k);
  high = (VUint)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  low = (VUint)_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, k = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
  high = (VUint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = (VUint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t product = static_cast<uint64_t>(a[lane]) * factor;
    high[lane] = static_cast<uint32_t>(product >> 32);
    low[lane] = static_cast<uint32_t>(product);
  }
#endif
}

// Mask bits of kLanes consecutive unit blocks: bits[i] as mask_block(at, first + i, pass, keep).
TSYND_HD void mask_blocks(MaskAddress at, uint32_t first, uint32_t pass, uint32_t keep, uint16_t* bits) {
  VUint x, y = VUint{} + pass, z = VUint{} + at.layer, w = VUint{} + at.sample;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = first + static_cast<uint32_t>(lane);
  uint32_t key0 = at.key0, key1 = at.key1;
  for (int round = 0; round < kMaskRounds; ++round) {
    VUint high0, low0, high1, low1;
    multiply_wide(x, kPhiloxM0, high0, low0);
    multiply_wide(z, kPhiloxM1, high1, low1);
    x = high1 ^ y ^ key0;
    y = low1;
    z = high0 ^ w ^ key1;
    w = low0;
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
#if defined(__AVX512BW__)
  // 4 x 4 transposes inside the 128-bit parts bring the 16 bytes of a block together
  const __m512i a = _mm512_unpacklo_epi32((__m512i)x, (__m512i)y),
                b = _mm512_unpackhi_epi32((__m512i)x, (__m512i)y);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)z, (__m512i)w),
                d = _mm512_unpackhi_epi32((__m512i)z, (__m512i)w);
  const __m512i parts[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                            _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
  const __m512i limit = _mm512_set1_epi8(static_cast<char>(keep - 1));
  for (int part = 0; part < 4; ++part) {
    const uint64_t kept = _mm512_cmple_epu8_mask(parts[part], limit);
    for (int group = 0; group < 4; ++group)
      bits[4 * group + part] = static_cast<uint16_t>(kept >> (16 * group));
  }
#elif defined(__AVX2__)
  const __m256i a = _mm256_unpacklo_epi32((__m256i)x, (__m256i)y),
                b = _mm256_unpackhi_epi32((__m256i)x, (__m256i)y);
  const __m256i c = _mm256_unpacklo_epi32((__m256i)z, (__m256i)w),
                d = _mm256_unpackhi_epi32((__m256i)z, (__m256i)w);
  const __m256i parts[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                            _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
  const __m256i limit = _mm256_set1_epi8(static_cast<char>(keep - 1));
  for (int part = 0; part < 4; ++part) {
    const __m256i small = _mm256_cmpeq_epi8(_mm256_min_epu8(parts[part], limit), parts[part]);
    const uint32_t kept = static_cast<uint32_t>(_mm256_movemask_epi8(small));
    bits[part] = static_cast<uint16_t>(kept);
    bits[4 + part] = static_cast<uint16_t>(kept >> 16);
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t words[4] = {x[lane], y[lane], z[lane], w[lane]};
    uint32_t kept = 0;
    for (int unit = 0; unit < kUnitsPerBlock; ++unit)
      kept |= static_cast<uint32_t>(((words[unit / 4] >> (8 * (unit % 4))) & 0xFFu) < keep) << unit;
    bits[lane] = static_cast<uint16_t>(kept);
  }
#endif
}

// Lanes whose bit of `bits`, counted from `first`, is set.
TSYND_HD VInt expand_bits(uint32_t bits, int first) {
  VInt position;
  for (int lane = 0; lane < kLanes; ++lane) position[lane] = 1 << (first + lane);
  return ((VInt{} + static_cast<int32_t>(bits)) & position) != 0;
}

TSYND_HD float sum_lanes(VFloat x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

}  // namespace tsynd::TSYND_ISA
