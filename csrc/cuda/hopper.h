// What the sm_90a kernel asks of the machine beyond device.h, behind names of our own: barriers that count
// arrivals and bytes, boxes of a tensor copied by the bulk copy engine, products of a warpgroup, clusters of
// blocks. tests/cpp/emulator_hopper.h carries them out on the host.
//
// Taken from: PTX ISA 9.7.13 (mbarrier), 9.7.9.27 (cp.async.bulk.tensor), 9.7.15 (wgmma), and, where its text
// leaves room, from code that runs on Hopper: CUTLASS cute/arch/mma_sm90_desc.hpp (fields of a descriptor),
// cute/atom/mma_traits_sm90_gmma.hpp (the canonical layouts), cutlass/arch/barrier.h (the barrier
// instructions' spelling); DeepGEMM mma/sm90.cuh (the same descriptors without CuTe).
#pragma once

#include "device.h"

#if defined(__CUDACC__)
#include <cuda.h>  // types alone: the driver library is not linked
#include <cudaTypedefs.h>
#else
#include "emulator_hopper.h"
#endif

namespace tsynd {

constexpr int kWarpgroupWarps = 4;

// A tensor of 16-bit values with three dimensions, innermost first, and the box of it that one copy moves. In
// shared memory a box is [box[2]][box[1]] rows of 64 values, 128 bytes each, 128-byte swizzled; what lies
// outside the tensor is zero there.
struct BoxedTensor {
  const void* base;
  uint64_t size[3], stride[2];  // stride: bytes, of dimensions 1 and 2
  uint32_t box[3];
  bool bfloat16;
};

// Names a tile in shared memory for wgmma: rows of 128 bytes, 128-byte swizzled, 1024 bytes from eight rows
// to the next eight. As K-major operand a row is a row (or column) of the matrix and k runs along it, so the
// next 16 of k are 32 bytes on; as MN-major operand a row is a k, so they are 16 rows on.
//
// Bits 0-13 address, 16-29 leading offset, 32-45 stride offset, each over 16; 49-51 base offset, 0 since
// tiles start on 1024 bytes; 62-63 swizzle, 1 for 128 bytes. The leading offset is unused K-major, and
// MN-major up to 64 values.
TSYND_DEVICE uint64_t tile_descriptor(const void* tile) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3FFFF) >> 4) | 1ull << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}
// What `bytes` further on in shared memory adds to a descriptor.
TSYND_DEVICE uint64_t descriptor_step(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

// The driver's function by its address, so that the module loads where there is no driver. Touches neither
// stream nor device.
inline TensorMap tensor_map(const BoxedTensor& tensor) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &answer);
#endif
    if (error != cudaSuccess || answer != cudaDriverEntryPointSuccess || found == nullptr)
      throw std::runtime_error("CUDA: this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  TensorMap map;
  const cuuint64_t size[3] = {tensor.size[0], tensor.size[1], tensor.size[2]},
                   stride[2] = {tensor.stride[0], tensor.stride[1]};
  const cuuint32_t box[3] = {tensor.box[0], tensor.box[1], tensor.box[2]}, each[3] = {1, 1, 1};
  const CUresult result = encode(
      &map, tensor.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(tensor.base), size, stride, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("CUDA: cuTensorMapEncodeTiled gave error " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

// One launch in clusters of `cluster` blocks; `blocks` is a multiple of it.
template <class... Parameters, class... Arguments>
void launch_clusters(Stream stream, void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads,
                     int64_t shared_bytes, Arguments... arguments) {
  if (blocks > 0x7FFFFFFF)
    throw std::runtime_error("more blocks than a grid holds: " + std::to_string(blocks));
  check_launch(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

TSYND_DEVICE void trap() { __trap(); }

// The warp's number, known to the compiler to be the same in all its lanes.
TSYND_DEVICE int uniform_warp() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0); }
// A warpgroup's share of the register file from here on, in registers a thread.
template <int kRegisters>
TSYND_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TSYND_DEVICE void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
TSYND_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all blocks of the cluster.
TSYND_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The first `threads` threads of the block, whole warps.
TSYND_DEVICE void sync_threads(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

TSYND_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// What barrier_init wrote, for the cluster and for the copy engine, once sync_cluster has been passed.
TSYND_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// One arrival, and `bytes` more that copies have to bring before the phase ends.
TSYND_DEVICE void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// One arrival at the barrier in the same place of block `rank` of the cluster.
TSYND_DEVICE void arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
TSYND_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
constexpr uint64_t kLongestWait = 20ull * 1000 * 1000 * 1000;  // nanoseconds

// Until the phase of this parity has ended. A try sleeps a microsecond at most; a wait of more than twenty
// seconds by the clock (a sanitizer may make each try slow) is an error, never a hang.
TSYND_DEVICE void wait_barrier(uint64_t* barrier, uint32_t parity) {
  uint64_t since = 0;
  for (uint32_t tries = 1;; ++tries) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred ended;\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2, %3;\n"
        "selp.b32 %0, 1, 0, ended;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity), "r"(1000)
        : "memory");
    if (done) return;
    if (tries % 1024 == 0) {
      const uint64_t now = nanoseconds();
      if (since == 0) since = now;
      if (now - since > kLongestWait) trap();
    }
  }
}

// The box at these coordinates to `to` and its bytes to `barrier`.
TSYND_DEVICE void load_box(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// The same, to the same places of every block of the cluster whose bit is set.
TSYND_DEVICE void load_box(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2,
                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Before a warpgroup's first product, and after registers that products use were touched otherwise.
TSYND_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TSYND_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
TSYND_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Accumulators that a wait has made valid: keeps the compiler from reading them before it.
template <int kTiles>
TSYND_DEVICE void settle(float (&c)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[j][i])::"memory");
}

#define TSYND_C8(c, j)                                                                              \
  "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3]), "+f"(c[j + 1][0]), "+f"(c[j + 1][1]), \
      "+f"(c[j + 1][2]), "+f"(c[j + 1][3])
#define TSYND_C32(c, j) TSYND_C8(c, j), TSYND_C8(c, j + 2), TSYND_C8(c, j + 4), TSYND_C8(c, j + 6)
#define TSYND_C64(c, j) TSYND_C32(c, j), TSYND_C32(c, j + 8)
#define TSYND_C128(c, j) TSYND_C64(c, j), TSYND_C64(c, j + 16)
#define TSYND_N32                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, "                                                                                                \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TSYND_N64                                                                                \
  TSYND_N32                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TSYND_N128                                                                               \
  TSYND_N64                                                                                      \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "   \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// scale-d as predicate, scale-a and scale-b 1, then who is MN-major
#define TSYND_TILES(shape, type, numbers, a, b, flag, operands)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" flag ", 0;\nwgmma.mma_async.sync.aligned." shape \
               ".f32." type "." type " {" numbers "}, %" a ", %" b ", p, 1, 1, 0, 0;\n}"             \
               : operands                                                                            \
               : "l"(rows), "l"(columns), "r"(static_cast<int>(accumulate)))
#define TSYND_SLOPES(type)                                                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type \
               "." type " {" TSYND_N32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"                       \
               : TSYND_C32(c, 0)                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns),                                  \
                 "r"(static_cast<int>(accumulate)))

// c (+)= rows columns^T over 16 of k, both K-major tiles: 64 rows a warpgroup, 16 a warp, kTiles * 8 columns,
// with the accumulator fragments of m64nNk16, which are those of m16n8k16 side by side.
template <class T, int kTiles>
TSYND_DEVICE void multiply_tiles(float (&c)[kTiles][4], uint64_t rows, uint64_t columns, bool accumulate) {
  static_assert(kTiles == 16 || kTiles == 32, "128 or 256 columns");
  if constexpr (kTiles == 32 && std::is_same_v<T, BFloat16>)
    TSYND_TILES("m64n256k16", "bf16", TSYND_N128, "128", "129", "130", TSYND_C128(c, 0));
  else if constexpr (kTiles == 32)
    TSYND_TILES("m64n256k16", "f16", TSYND_N128, "128", "129", "130", TSYND_C128(c, 0));
  else if constexpr (std::is_same_v<T, BFloat16>)
    TSYND_TILES("m64n128k16", "bf16", TSYND_N64, "64", "65", "66", TSYND_C64(c, 0));
  else
    TSYND_TILES("m64n128k16", "f16", TSYND_N64, "64", "65", "66", TSYND_C64(c, 0));
}
// c (+)= a columns over 16 of k, a in registers with the fragments of m16n8k16, columns an MN-major tile of
// 64.
template <class T>
TSYND_DEVICE void multiply_slopes(float (&c)[8][4], const uint32_t (&a)[4], uint64_t columns,
                                  bool accumulate) {
  if constexpr (std::is_same_v<T, BFloat16>)
    TSYND_SLOPES("bf16");
  else
    TSYND_SLOPES("f16");
}

#undef TSYND_C8
#undef TSYND_C32
#undef TSYND_C64
#undef TSYND_C128
#undef TSYND_N32
#undef TSYND_N64
#undef TSYND_N128
#undef TSYND_TILES
#undef TSYND_SLOPES

#else

template <class... Parameters, class... Arguments>
void launch_clusters(Stream order, void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads,
                     int64_t shared_bytes, Arguments... arguments) {
  emulator::launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                   static_cast<size_t>(shared_bytes), order, static_cast<unsigned>(cluster), arguments...);
}

#endif

}  // namespace tsynd
