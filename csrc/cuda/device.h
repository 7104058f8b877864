// What the kernels ask of the machine, behind names of our own: warp shuffles, tensor-core products,
// asynchronous copies. nvcc turns them into the instructions; the kernel tests compile the same kernels for
// the host, where tests/cpp/emulator.h carries them out thread by thread.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../uncertainty.h"
#include "plan.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define TSYND_DEVICE static __device__ __forceinline__
#else
#include "emulator.h"
#define TSYND_DEVICE static inline
#endif

namespace tsynd {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Storage of the narrow types; all arithmetic is float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#if defined(__CUDACC__)

TSYND_DEVICE float to_float(float x) { return x; }
TSYND_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
TSYND_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
template <class T>
TSYND_DEVICE T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return Half{__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// Two narrow values in one register, the first in the low half.
template <class T>
TSYND_DEVICE uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// Byte i of the result is byte selector[i] & 7 of (high:low), or its sign bit eight times where selector[i]
// & 8.
TSYND_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

TSYND_DEVICE float shuffle_xor(float x, int offset) { return __shfl_xor_sync(kAllLanes, x, offset); }
TSYND_DEVICE uint32_t shuffle_xor(uint32_t x, int offset) { return __shfl_xor_sync(kAllLanes, x, offset); }
TSYND_DEVICE void sync_warp() { __syncwarp(); }
TSYND_DEVICE void sync_block() { __syncthreads(); }

// Dynamic shared memory, aligned for 16-byte copies of whole 128-byte rows.
TSYND_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char tsynd_shared[];
  return tsynd_shared;
}

TSYND_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from device to shared memory, in flight until wait_copies; zeros where `real` is false.
TSYND_DEVICE void copy_async(void* to, const void* from, bool real) {
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
TSYND_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kPending` of this thread's latest groups are in flight.
template <int kPending>
TSYND_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit values from shared memory; lane l gives the address of row l % 8 of matrix l /
// 8 and receives of each matrix the elements (l / 4, 2 (l % 4)) and the next; transposed: (2 (l % 4), l / 4)
// and the one below.
TSYND_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
TSYND_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a [16, 16], b [16, 8], with the fragments of mma.m16n8k16 (PTX ISA).
template <class T>
TSYND_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// exp by the special-function unit: two units in the last place, as narrow inputs deserve; below 1e-38 it is
// 0, which saves __expf's care for denormal results.
TSYND_DEVICE float quick_exp(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x * 1.44269504f));
  return out;
}
TSYND_DEVICE float quick_log(float x) { return __logf(x); }
TSYND_DEVICE float quick_divide(float a, float b) { return __fdividef(a, b); }
TSYND_DEVICE float infinity() { return __int_as_float(0x7f800000); }

using Stream = cudaStream_t;

// The runtime keeps the error of a call that failed, and the next launch that succeeds would read it as its
// own.
inline void check_launch(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(error));
}

// One launch on `stream`, with as much dynamic shared memory as it needs; launch errors are exceptions.
template <class... Parameters, class... Arguments>
void launch(Stream stream, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  if (blocks > 0x7FFFFFFF)
    throw std::runtime_error("more blocks than a grid holds: " + std::to_string(blocks));
  if (shared_bytes > 48 * 1024)
    check_launch(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)));
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           stream>>>(arguments...);
  check_launch(cudaGetLastError());
}

#else

TSYND_DEVICE float to_float(Half x) { return half_value(x.bits); }
TSYND_DEVICE float to_float(BFloat16 x) { return bfloat16_value(x.bits); }
template <>
inline Half from_float<Half>(float x) {
  return Half{half_bits(x)};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return BFloat16{bfloat16_bits(x)};
}
template <class T>
TSYND_DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// Stands for the order in which the emulator runs the threads.
using Stream = unsigned;

template <class... Parameters, class... Arguments>
void launch(Stream order, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  emulator::launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                   static_cast<size_t>(shared_bytes), order, 1u, arguments...);
}

#endif

// Call f(std::integral_constant<int, n>()) for the n of the list that equals `value`.
template <int... kChoices, class F>
void with_constant(int value, const F& f) {
  const bool found = ((value == kChoices && (f(std::integral_constant<int, kChoices>()), true)) || ...);
  if (!found) throw std::runtime_error("no kernel was compiled for size " + std::to_string(value));
}

inline int64_t blocks_for(int64_t work, int64_t each) { return (work + each - 1) / each; }

// Arithmetic of uncertainty.h on a thread's own value. Float32 inputs get the library's functions.
template <class T>
struct Math {
  using V = float;
  TSYND_DEVICE float splat(float x) { return x; }
  TSYND_DEVICE float max(float a, float b) { return a < b ? b : a; }
  TSYND_DEVICE float select(bool mask, float a, float b) { return mask ? a : b; }
  TSYND_DEVICE bool less(float a, float b) { return a < b; }
  TSYND_DEVICE float exp(float x) { return expf(x); }
  TSYND_DEVICE float expm1(float x) { return expm1f(x); }
  TSYND_DEVICE float log1p(float x) { return log1pf(x); }
  TSYND_DEVICE float inverse(float x) { return 1.f / x; }
};

// For narrow inputs: short series near 0, where relative accuracy is wanted, and the special-function unit
// elsewhere.
struct QuickMath {
  using V = float;
  TSYND_DEVICE float splat(float x) { return x; }
  TSYND_DEVICE float max(float a, float b) { return a < b ? b : a; }
  TSYND_DEVICE float select(bool mask, float a, float b) { return mask ? a : b; }
  TSYND_DEVICE bool less(float a, float b) { return a < b; }
  TSYND_DEVICE float exp(float x) { return quick_exp(x); }
  TSYND_DEVICE float expm1(float x) {
    // x + x^2/2! + ... + x^7/7!: 2e-8 of the result at -0.5
    float series = 1.f / 5040.f;
    series = series * x + 1.f / 720.f;
    series = series * x + 1.f / 120.f;
    series = series * x + 1.f / 24.f;
    series = series * x + 1.f / 6.f;
    series = series * x + 0.5f;
    series = series * x + 1.f;
    return x > -0.5f ? series * x : quick_exp(x) - 1.f;
  }
  TSYND_DEVICE float log1p(float x) {
    // 2 atanh(x / (2 + x)): 3e-9 of the result at 1/4 and -1/5
    const float s = quick_divide(x, 2.f + x), squared = s * s;
    float series = 1.f / 9.f;
    series = series * squared + 1.f / 7.f;
    series = series * squared + 1.f / 5.f;
    series = series * squared + 1.f / 3.f;
    series = series * squared + 1.f;
    return x < 0.25f && x > -0.2f ? 2.f * s * series : quick_log(1.f + x);
  }
  TSYND_DEVICE float inverse(float x) { return quick_divide(1.f, x); }  // without a call for rare x
};
template <>
struct Math<Half> : QuickMath {};
template <>
struct Math<BFloat16> : QuickMath {};

}  // namespace tsynd
