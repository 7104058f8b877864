// A ladder of tiny kernels with known answers, each a step up in what it asks of the machine, by the names
// that the real kernels use (csrc/cuda/device.h, hopper.h). `bring_up RUNG` climbs one, so that what a rung
// breaks is its own; `bring_up --list` names them with what a failure means. No torch. Built by a host
// compiler the emulator climbs it, which shows that the answers are right (tests/cpp).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace {

using namespace tsynd;

struct Skip {
  std::string why;
};

#if defined(__CUDACC__)
void must(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  must(cudaGetDevice(&device), "cudaGetDevice");
  must(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}
#endif

// Memory that both sides see.
template <class T>
class Shared {
 public:
  explicit Shared(size_t count) : count_(count) {
#if defined(__CUDACC__)
    must(cudaMallocManaged(&data_, count * sizeof(T)), "cudaMallocManaged");
#else
    data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
#endif
    std::memset(data_, 0xFF, count * sizeof(T));
  }
  Shared(const Shared&) = delete;
#if defined(__CUDACC__)
  ~Shared() { cudaFree(data_); }
#else
  ~Shared() { std::free(data_); }
#endif
  T* get() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

#if defined(__CUDACC__)
constexpr Stream kStream = nullptr;
void finish(cudaStream_t stream = nullptr) { must(cudaStreamSynchronize(stream), "the kernel"); }
#else
constexpr Stream kStream = 1;
void finish() {}
#endif

template <class Got, class Wanted>
void expect(Shared<Got>& got, const Wanted& wanted) {
  size_t wrong = 0;
  std::string first;
  for (size_t i = 0; i < got.size(); ++i)
    if (!(static_cast<double>(got[i]) == static_cast<double>(wanted(i))) && ++wrong == 1)
      first = "element " + std::to_string(i) + " is " + std::to_string(static_cast<double>(got[i])) +
              ", wanted " + std::to_string(static_cast<double>(wanted(i)));
  if (wrong)
    throw std::runtime_error(std::to_string(wrong) + " of " + std::to_string(got.size()) +
                             " wrong: " + first);
}

// Element (row, column) of a test matrix: whole numbers, so that every sum is exact, with no pattern that a
// mistaken index would keep.
__host__ __device__ inline float pattern(int row, int column, int which) {
  return static_cast<float>((row * 7 + column * 11 + row * column * (3 + which) + which) % 7 - 3);
}
__host__ __device__ inline uint16_t as_bfloat16(float x) {  // exact for small whole numbers
#if defined(__CUDA_ARCH__)
  return static_cast<uint16_t>(__float_as_uint(x) >> 16);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
#endif
}
__host__ inline double dot(int row, int column, int length, int a, int b) {
  double sum = 0.;
  for (int k = 0; k < length; ++k) sum += static_cast<double>(pattern(row, k, a)) * pattern(column, k, b);
  return sum;
}

// --- launches

__global__ void count_up(int* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = 3 * i + 1;
}
void launches() {
  Shared<int> out(1000);
  launch(kStream, count_up, 4, 256, 0, out.get(), 1000);
  finish();
  expect(out, [](size_t i) { return 3 * i + 1; });
}

#if defined(__CUDACC__)
__global__ void linger(unsigned long long nanos) {
  const uint64_t since = nanoseconds();
  while (nanoseconds() - since < nanos) {
  }
}
__global__ void twice(const int* in, int* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = 2 * in[i];
}
// What a side stream prepares late is what the next launch on it reads.
void streams() {
  cudaStream_t side;
  must(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "cudaStreamCreate");
  Shared<int> middle(1000), out(1000);
  launch(side, linger, 1, 1, 0, 20000000ull);
  launch(side, count_up, 4, 256, 0, middle.get(), 1000);
  launch(side, twice, 4, 256, 0, static_cast<const int*>(middle.get()), out.get(), 1000);
  if (cudaStreamQuery(side) != cudaErrorNotReady)
    throw std::runtime_error("the launches waited for the GPU, or were not on their stream");
  finish(side);
  expect(out, [](size_t i) { return 6 * i + 2; });
  must(cudaStreamDestroy(side), "cudaStreamDestroy");
}

void second_device() {
  int count = 0;
  must(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (count < 2) throw Skip{"one device"};
  must(cudaSetDevice(count - 1), "cudaSetDevice");
  launches();
}
#else
void only_on_a_device() { throw Skip{"on a device alone"}; }
constexpr auto streams = only_on_a_device, second_device = only_on_a_device,
               failed_launch_is_forgotten = only_on_a_device;
#endif

__global__ void fill_shared(int* out, int n) {
  int* const all = reinterpret_cast<int*>(shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) all[i] = 5 * i;
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
    out[i] = all[n - 1 - i];
}
void large_shared_memory() {
#if defined(__CUDACC__)
  const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), n = bytes / 4;
#else
  const int bytes = 227 * 1024, n = bytes / 4;
#endif
  Shared<int> out(static_cast<size_t>(n));
  launch(kStream, fill_shared, 1, 256, bytes, out.get(), n);
  finish();
  expect(out, [n](size_t i) { return 5 * (n - 1 - static_cast<int>(i)); });
}

#if defined(__CUDACC__)
// More shared memory than there is (or no device at all): refused with an error, and the next launch is none
// the wiser.
void failed_launch_is_forgotten() {
  bool refused = false;
  try {
    launch(kStream, fill_shared, 1, 256, int64_t{1} << 20, static_cast<int*>(nullptr), 4);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  if (!refused) throw std::runtime_error("a launch with 1 MiB of shared memory was not refused");
  if (cudaPeekAtLastError() != cudaSuccess)
    throw std::runtime_error("the error of the refused launch is still set");
}
#endif

// --- warps and asynchronous copies

__global__ void exchange(float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  float sum = static_cast<float>(lane);
  for (int offset = 16; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
  out[lane] = sum + shuffle_xor(static_cast<float>(lane), 5);
}
void shuffles() {
  Shared<float> out(32);
  launch(kStream, exchange, 1, 32, 0, out.get());
  finish();
  expect(out, [](size_t i) { return 496. + static_cast<double>(i ^ 5); });
}

__global__ void bytes_and_halves(uint32_t* out) {
  out[0] = permute_bytes(0x83726150u, 0xC7B6A594u, 0x7520u);
  out[1] = permute_bytes(0x83726150u, 0xC7B6A594u, 0x9988u);  // signs
  out[2] = permute_bytes(0x83726150u, 0xC7B6A594u, 0xBBAAu);
  out[3] = pack<BFloat16>(1.f, -2.f);
  out[4] = pack<Half>(1.f, -2.f);
  out[5] = static_cast<uint32_t>(quick_exp(0.f) * 8.f);
}
void byte_permutations() {
  Shared<uint32_t> out(6);
  launch(kStream, bytes_and_halves, 1, 1, 0, out.get());
  finish();
  const uint32_t wanted[] = {0xC7A57250u, 0u, 0xFFFF0000u, 0xC0003F80u, 0xC0003C00u, 8u};
  expect(out, [&](size_t i) { return wanted[i]; });
}

__global__ void staged(const uint4* in, uint4* out, int n) {
  uint4* const tile = reinterpret_cast<uint4*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  copy_async(tile + i, in + i, true);
  commit_copies();
  copy_async(tile + n + i, in + n + i, i % 2 == 0);  // zeros where not real
  commit_copies();
  wait_copies<1>();
  sync_block();
  out[i] = tile[n - 1 - i];
  wait_copies<0>();
  sync_block();
  out[n + i] = tile[n + (i ^ 1)];
}
void asynchronous_copies() {
  constexpr int kCount = 128;
  Shared<uint32_t> in(8 * kCount), out(8 * kCount);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i + 1);
  launch(kStream, staged, 1, kCount, 2 * kCount * 16, reinterpret_cast<const uint4*>(in.get()),
         reinterpret_cast<uint4*>(out.get()), kCount);
  finish();
  expect(out, [](size_t i) -> size_t {
    const size_t piece = i / 4, word = i % 4;
    if (piece < kCount) return 4 * (kCount - 1 - piece) + word + 1;
    const size_t from = (piece - kCount) ^ 1;
    return from % 2 ? 0 : 4 * (kCount + from) + word + 1;
  });
}

// --- mma.sync

__global__ void one_tile(float* out, bool transposed) {
  // a [16][16], b [8][16] as columns, or [16][8] for the transposed read; rows of 16 values
  uint16_t* const a = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* const b = a + 256;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) a[i] = as_bfloat16(pattern(i / 16, i % 16, 1));
  for (int i = lane; i < 256; i += 32) {
    const int row = i / 16, column = i % 16;
    b[i] = as_bfloat16(transposed ? (column < 8 ? pattern(column, row, 2) : 0.f)
                       : row < 8  ? pattern(row, column, 2)
                                  : 0.f);
  }
  sync_warp();
  uint32_t x[4], y[4];
  load_matrices(x, a + (lane % 16) * 16 + lane / 16 * 8);
  if (transposed)
    load_matrices_transposed(y, b + (lane % 16) * 16 + lane / 16 * 8);
  else
    load_matrices(y, b + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  float c[4] = {1.f, 1.f, 1.f, 1.f};
  multiply_add<BFloat16>(c, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = c[i];
}
void tensor_core_tile(bool transposed) {
  Shared<float> out(128);
  launch(kStream, one_tile, 1, 32, 1024, out.get(), transposed);
  finish();
  expect(out, [](size_t i) { return 1. + dot(static_cast<int>(i / 8), static_cast<int>(i % 8), 16, 1, 2); });
}

// --- Hopper: compiled for sm_90a alone
#if defined(TSYND_SM90A) || !defined(__CUDACC__)

void need_hopper() {
#if defined(__CUDACC__)
  const int major = attribute(cudaDevAttrComputeCapabilityMajor),
            minor = attribute(cudaDevAttrComputeCapabilityMinor);
  if (major != 9 || minor != 0)
    throw Skip{"compute capability " + std::to_string(major) + "." + std::to_string(minor) + ", wants 9.0"};
#endif
}

__global__ void phases(int* out) {
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  int* const box = reinterpret_cast<int*>(shared_memory() + 64);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    barrier_init(barrier, 2);
    publish_barriers();
  }
  sync_cluster();
  for (int round = 0; round < 4; ++round) {
    if (thread == 32 || thread == 64) {
      box[thread / 32] = 100 * round + thread;
      arrive_at(barrier, 0);
    }
    if (thread < 32) {
      wait_barrier(barrier, static_cast<uint32_t>(round & 1));
      if (thread == 0) out[round] = box[1] + box[2];
    }
    sync_block();
  }
  sync_cluster();
}
void barrier_phases() {
  need_hopper();
  Shared<int> out(4);
  launch_clusters(kStream, phases, 1, 1, 96, 128, out.get());
  finish();
  expect(out, [](size_t i) { return 200 * i + 96; });
}

// A box of a tensor, read back through the swizzle.
__global__ void one_box(const __grid_constant__ TensorMap map, uint16_t* out, int rows, int c0, int c1,
                        int c2) {
  unsigned char* const tile = shared_memory();
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(tile + rows * 128);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    publish_barriers();
  }
  sync_cluster();
  if (threadIdx.x == 0) {
    arrive_expecting(barrier, rows * 128);
    load_box(tile, map, barrier, c0, c1, c2);
  }
  wait_barrier(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < rows * 64; i += static_cast<int>(blockDim.x)) {
    const int row = i / 64, byte = (i % 64) * 2;
    out[i] = *reinterpret_cast<const uint16_t*>(tile + row * 128 + (byte ^ (row % 8) * 16));
  }
  sync_cluster();
}
void box_of_a_tensor(bool turned) {
  need_hopper();
  // features [images, units]; or weights [passes, classes, units] as (unit, pass, class), whose strides fall
  constexpr int kUnits = 72, kPasses = 11, kClasses = 3;
  Shared<uint16_t> in(static_cast<size_t>(kPasses) * kClasses * kUnits);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i + 1);
  const uint64_t line = 2 * kUnits;
  const BoxedTensor tensor =
      turned ? BoxedTensor{in.get(), {kUnits, kPasses, kClasses}, {line * kClasses, line}, {64, 8, 4}, true}
             : BoxedTensor{in.get(), {kUnits, kPasses * kClasses, 1}, {line, line}, {64, 32, 1}, true};
  Shared<uint16_t> out(32 * 64);
  const int unit = 64, first = turned ? 8 : 16;  // the edge: the last 8 units, and rows that are not there
  launch_clusters(kStream, one_box, 1, 1, 128, 32 * 128 + 64, tensor_map(tensor), out.get(), 32, unit, first,
                  0);
  finish();
  expect(out, [&](size_t i) -> size_t {
    const size_t row = i / 64, at = unit + i % 64;
    if (at >= kUnits) return 0;
    if (!turned) return first + row < kPasses * kClasses ? (first + row) * kUnits + at + 1 : 0;
    const size_t pass = first + row % 8, kind = row / 8;
    return pass < kPasses && kind < kClasses ? (pass * kClasses + kind) * kUnits + at + 1 : 0;
  });
}

// What threads wrote to shared memory, for wgmma to read.
TSYND_DEVICE void written_for_products() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// 64 rows and 8 kTiles columns, 64 of k: both K-major.
template <int kTiles>
__global__ void tiles(float* out) {
  unsigned char* const rows = shared_memory();
  unsigned char* const columns = rows + 64 * 128;
  const auto put = [](unsigned char* tile, int row, int k, float x) {
    *reinterpret_cast<uint16_t*>(tile + row * 128 + ((2 * k) ^ (row % 8) * 16)) = as_bfloat16(x);
  };
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64; i += 128)
    put(rows, i / 64, i % 64, pattern(i / 64, i % 64, 1));
  for (int i = static_cast<int>(threadIdx.x); i < 8 * kTiles * 64; i += 128)
    put(columns, i / 64, i % 64, pattern(i / 64, i % 64, 2));
  written_for_products();
  sync_block();
  float c[kTiles][4];
  settle(c);
  product_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
    multiply_tiles<BFloat16>(c, tile_descriptor(rows) + descriptor_step(32 * k),
                             tile_descriptor(columns) + descriptor_step(32 * k), k > 0);
  commit_products();
  wait_products<0>();
  settle(c);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[(16 * warp + lane / 4 + i / 2 * 8) * 8 * kTiles + 8 * j + 2 * (lane % 4) + i % 2] = c[j][i];
}
template <int kTiles>
void k_major_product() {
  need_hopper();
  Shared<float> out(static_cast<size_t>(64) * 8 * kTiles);
  launch(kStream, tiles<kTiles>, 1, 128, (64 + 8 * kTiles) * 128, out.get());
  finish();
  expect(out, [](size_t i) {
    return dot(static_cast<int>(i / (8 * kTiles)), static_cast<int>(i % (8 * kTiles)), 64, 1, 2);
  });
}

// 64 rows from registers, 64 columns from an MN-major tile, 64 of k.
__global__ void slopes(float* out) {
  unsigned char* const tile = shared_memory();
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64; i += 128) {
    const int k = i / 64, n = i % 64;
    *reinterpret_cast<uint16_t*>(tile + k * 128 + ((2 * n) ^ (k % 8) * 16)) = as_bfloat16(pattern(n, k, 2));
  }
  written_for_products();
  sync_block();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t a[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + i % 2 * 8, at = 16 * k + 2 * (lane % 4) + i / 2 * 8;
      a[k][i] = pack<BFloat16>(pattern(row, at, 1), pattern(row, at + 1, 1));
    }
  float c[8][4];
  settle(c);
  product_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
    multiply_slopes<BFloat16>(c, a[k], tile_descriptor(tile) + descriptor_step(k * 16 * 128), k > 0);
  commit_products();
  wait_products<0>();
  settle(c);
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[(16 * warp + lane / 4 + i / 2 * 8) * 64 + 8 * j + 2 * (lane % 4) + i % 2] = c[j][i];
}
void mn_major_product() {
  need_hopper();
  Shared<float> out(64 * 64);
  launch(kStream, slopes, 1, 128, 64 * 128, out.get());
  finish();
  expect(out, [](size_t i) { return dot(static_cast<int>(i / 64), static_cast<int>(i % 64), 64, 1, 2); });
}

// Each block of a cluster of four fetches eight rows for all of them; then each tells block 0 that it has
// read.
__global__ void shared_boxes(const __grid_constant__ TensorMap map, uint16_t* out, int* told) {
  unsigned char* const tile = shared_memory();
  uint64_t* const full = reinterpret_cast<uint64_t*>(tile + 32 * 128);
  uint64_t* const read = full + 1;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(read, 4);
    publish_barriers();
  }
  sync_cluster();
  if (threadIdx.x == 0) {
    arrive_expecting(full, 32 * 128);
    load_box(tile + rank * 8 * 128, map, full, 0, 8 * rank, 0, static_cast<uint16_t>(15));
  }
  wait_barrier(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 32 * 64; i += 128) {
    const int row = i / 64;
    out[rank * 32 * 64 + i] =
        *reinterpret_cast<const uint16_t*>(tile + row * 128 + ((2 * (i % 64)) ^ (row % 8) * 16));
  }
  sync_block();
  if (threadIdx.x == 0) arrive_at(read, 0);
  if (rank == 0) {
    wait_barrier(read, 0);
    if (threadIdx.x == 0) told[0] = 1;
  }
  sync_cluster();
}
void multicast() {
  need_hopper();
  Shared<uint16_t> in(32 * 64), out(4 * 32 * 64);
  Shared<int> told(1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i + 1);
  const BoxedTensor tensor{in.get(), {64, 32, 1}, {128, 128}, {64, 8, 1}, true};
  launch_clusters(kStream, shared_boxes, 4, 4, 128, 32 * 128 + 64, tensor_map(tensor), out.get(), told.get());
  finish();
  expect(out, [](size_t i) { return i % (32 * 64) + 1; });
  expect(told, [](size_t) { return 1; });
}

// Two warpgroups take 240 registers, a third gives its own away; as wgmma_head's launch.
__global__ void __launch_bounds__(384, 1) shifted_registers(int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if (uniform_warp() >= 8) {
    leave_registers<24>();
  } else {
    take_registers<240>();
    int x[160];
#pragma unroll
    for (int i = 0; i < 160; ++i) x[i] = thread * i;
#pragma unroll
    for (int i = 0; i < 160; ++i) asm volatile("" : "+r"(x[i]));  // in registers
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 160; ++i) sum += x[i];
    sync_threads(256);
    out[thread] = sum;
  }
  sync_warp();
  sync_cluster();
}
void moved_registers() {
  need_hopper();
  Shared<int> out(256);
  launch_clusters(kStream, shifted_registers, 1, 1, 384, 1024, out.get());
  finish();
  expect(out, [](size_t i) { return i * 160 * 159 / 2; });
}

#else
void absent() { throw Skip{"this program was built without sm_90a"}; }
constexpr auto barrier_phases = absent, mn_major_product = absent, multicast = absent,
               moved_registers = absent;
void box_of_a_tensor(bool) { absent(); }
template <int>
void k_major_product() {
  absent();
}
#endif

struct Rung {
  const char *name, *meaning;
  std::function<void()> climb;
};
const Rung kRungs[] = {
    {"launch", "driver, toolkit or architecture do not fit: nothing else can run", launches},
    {"stream", "work does not go to the stream it is given", streams},
    {"second device", "the current device is taken for the tensor's", second_device},
    {"shared memory", "more than 48 KiB are not opted into: every fused kernel fails", large_shared_memory},
    {"failed launch", "an error outlives its report: the next good launch would seem to fail",
     failed_launch_is_forgotten},
    {"shuffle", "exchanges within a warp: the row arithmetic is wrong everywhere", shuffles},
    {"bytes", "byte permutations or narrow conversions: the dropout masks are wrong", byte_permutations},
    {"cp.async", "staged copies: fused_head reads what has not arrived", asynchronous_copies},
    {"mma tile", "ldmatrix or mma.sync fragments: fused_head and dropout_head_tensor are wrong",
     [] { tensor_core_tile(false); }},
    {"mma transposed tile", "ldmatrix.trans: the gradient of fused_head is wrong",
     [] { tensor_core_tile(true); }},
    {"barrier phases", "mbarrier arrivals or parities: wgmma_head hangs or runs ahead", barrier_phases},
    {"box", "tensor map, copy engine or swizzle: wgmma_head reads wrong features",
     [] { box_of_a_tensor(false); }},
    {"box of a turned tensor",
     "a map whose strides fall: wgmma_head reads wrong weights, or the driver refuses them",
     [] { box_of_a_tensor(true); }},
    {"wgmma 128", "K-major descriptors or accumulators of m64n128k16: logits of wgmma_head are wrong",
     k_major_product<16>},
    {"wgmma 256", "the same of m64n256k16", k_major_product<32>},
    {"wgmma registers", "MN-major descriptor or register operand: the gradient of wgmma_head is wrong",
     mn_major_product},
    {"multicast", "clusters: boxes for several blocks, arrivals at another block", multicast},
    {"setmaxnreg", "moved registers: wgmma_head's launch is refused or its warps starve", moved_registers},
};

}  // namespace

int climb(const Rung& rung) {
  try {
    rung.climb();
    return 0;
  } catch (const Skip& skip) {
    std::printf("skipped: %s\n", skip.why.c_str());
    return 77;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}

int main(int argc, char** argv) {
  const std::string wanted = argc == 2 ? argv[1] : "";
  bool failed = false;
  for (const Rung& rung : kRungs) {
    if (wanted == "--list") std::printf("%s\t%s\n", rung.name, rung.meaning);
    if (wanted == rung.name) return climb(rung);
    if (wanted == "--all") {
      std::printf("%s: ", rung.name);
      const int code = climb(rung);
      if (code == 0) std::printf("holds\n");
      failed |= code == 1;
    }
  }
  if (wanted == "--list" || wanted == "--all") return failed;
  std::fprintf(stderr, "usage: bring_up --list | --all | RUNG\n");
  return 2;
}
