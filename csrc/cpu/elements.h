// Vectors from and to float32 and bfloat16 tensors, and the transposition of small tiles. As simd.h, for the
// kernels_*.cpp files alone.
#pragma once

#include "simd.h"

namespace tsynd::TSYND_ISA {

// The element type of bfloat16 tensors.
struct Bf16 {
  uint16_t bits;
};

TSYND_HD float to_float(float x) { return x; }
TSYND_HD float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

TSYND_HD void assign(float& to, float x) { to = x; }
TSYND_HD void assign(Bf16& to, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const bool nan = x != x;
  bits += 0x7FFFu + ((bits >> 16) & 1u);  // round to nearest even
  to.bits = nan ? static_cast<uint16_t>(0x7FC0) : static_cast<uint16_t>(bits >> 16);
}

// The top halves of float bits, rounded to nearest even: bfloat16 in the low half of every lane.
TSYND_HD VInt round_to_bf16(VFloat x) {
  const VInt bits = (VInt)x;
  const VInt rounded = (VInt)(((VUint)bits + 0x7FFFu + (((VUint)bits >> 16) & 1u)) >> 16);
  return x == x ? rounded : VInt{} + 0x7FC0;
}

// `count` of kLanes elements, zeros behind them.
TSYND_HD VFloat load_some(const float* from, int count) {
  if (count == kLanes) return load(from);
  VFloat out = VFloat{};
  for (int lane = 0; lane < count; ++lane) out[lane] = from[lane];
  return out;
}

TSYND_HD VFloat load_some(const Bf16* from, int count) {
#if defined(__AVX512F__)
  if (count == kLanes) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (VFloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
  }
#elif defined(__AVX2__)
  if (count == kLanes) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (VFloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
  }
#endif
  VFloat out = VFloat{};
  for (int lane = 0; lane < count; ++lane) out[lane] = to_float(from[lane]);
  return out;
}

TSYND_HD void store_some(float* to, VFloat x, int count) {
  if (count == kLanes) return store(to, x);
  for (int lane = 0; lane < count; ++lane) to[lane] = x[lane];
}

TSYND_HD void store_some(Bf16* to, VFloat x, int count) {
#if defined(__AVX512F__)
  if (count == kLanes) {
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)round_to_bf16(x));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
  }
#endif
  const VInt bits = round_to_bf16(x);
  for (int lane = 0; lane < count; ++lane) to[lane].bits = static_cast<uint16_t>(bits[lane]);
}

// Four neighbouring classes of an image, and a vector's 128-bit parts.
typedef float VFour __attribute__((vector_size(16)));

TSYND_HD VFour load_four(const float* from, int count) {
#if defined(__AVX2__)
  if (count == 4) return (VFour)_mm_loadu_ps(from);
  return (VFour)_mm_maskload_ps(from, _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3)));
#else
  VFour out = VFour{};
  for (int i = 0; i < count; ++i) out[i] = from[i];
  return out;
#endif
}

TSYND_HD VFour load_four(const Bf16* from, int count) {
#if defined(__AVX2__)
  if (count == 4) {
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (VFour)_mm_slli_epi32(_mm_cvtepu16_epi32(narrow), 16);
  }
#endif
  VFour out = VFour{};
  for (int i = 0; i < count; ++i) out[i] = to_float(from[i]);
  return out;
}

TSYND_HD void store_four(float* to, VFour x, int count) {
#if defined(__AVX2__)
  if (count == 4) return _mm_storeu_ps(to, (__m128)x);
  _mm_maskstore_ps(to, _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3)), (__m128)x);
#else
  for (int i = 0; i < count; ++i) to[i] = x[i];
#endif
}

TSYND_HD void store_four(Bf16* to, VFour x, int count) {
#if defined(__AVX2__)
  if (count == 4) {
    const __m128i bits = (__m128i)x, odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i rounded =
        _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7FFF)), odd), 16);
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps((__m128)x, (__m128)x));
    const __m128i kept = _mm_blendv_epi8(rounded, _mm_set1_epi32(0x7FC0), nan);
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(kept, kept));
  }
#endif
  for (int i = 0; i < count; ++i) assign(to[i], x[i]);
}

TSYND_HD VFloat join_parts(const VFour* parts) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512((__m128)parts[0]), (__m128)parts[1], 1);
  return (VFloat)_mm512_insertf32x4(_mm512_insertf32x4(low, (__m128)parts[2], 2), (__m128)parts[3], 3);
#elif defined(__AVX2__)
  return (VFloat)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)parts[0]), (__m128)parts[1], 1);
#else
  return parts[0];
#endif
}

TSYND_HD void split_parts(VFloat x, VFour* parts) {
#if defined(__AVX512F__)
  parts[0] = (VFour)_mm512_castps512_ps128((__m512)x);
  parts[1] = (VFour)_mm512_extractf32x4_ps((__m512)x, 1);
  parts[2] = (VFour)_mm512_extractf32x4_ps((__m512)x, 2);
  parts[3] = (VFour)_mm512_extractf32x4_ps((__m512)x, 3);
#elif defined(__AVX2__)
  parts[0] = (VFour)_mm256_castps256_ps128((__m256)x);
  parts[1] = (VFour)_mm256_extractf128_ps((__m256)x, 1);
#else
  parts[0] = x;
#endif
}

// 4 x 4 transposes inside the 128-bit parts of four vectors.
TSYND_HD void transpose_parts(VFloat* v) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]),
               b = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]),
               d = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
  v[0] = (VFloat)_mm512_shuffle_ps(a, c, 0x44);
  v[1] = (VFloat)_mm512_shuffle_ps(a, c, 0xEE);
  v[2] = (VFloat)_mm512_shuffle_ps(b, d, 0x44);
  v[3] = (VFloat)_mm512_shuffle_ps(b, d, 0xEE);
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]),
               b = _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]),
               d = _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]);
  v[0] = (VFloat)_mm256_shuffle_ps(a, c, 0x44);
  v[1] = (VFloat)_mm256_shuffle_ps(a, c, 0xEE);
  v[2] = (VFloat)_mm256_shuffle_ps(b, d, 0x44);
  v[3] = (VFloat)_mm256_shuffle_ps(b, d, 0xEE);
#else
  const VFloat from[4] = {v[0], v[1], v[2], v[3]};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) v[i][j] = from[j][i];
#endif
}

}  // namespace tsynd::TSYND_ISA
