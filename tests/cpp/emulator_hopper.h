// What csrc/cuda/hopper.h asks of the machine, on the host: barriers that count arrivals and bytes, copies of
// boxes that arrive late, clusters, and products of a warpgroup that read shared memory through their
// descriptors.
//
// Chosen at random, within what the PTX ISA allows: a copy lands at any moment after it was issued (until
// then its place holds NaNs) and only then adds its bytes; each block of a multicast gets its box at a moment
// of its own; a product reads shared memory when it is issued or when it is waited for, and its accumulators
// are NaN from one to the other. Refused: accumulators or operands in registers that no wgmma.fence stands
// before, barriers used before they were made known, more arrivals than a barrier counts, bytes or arrivals
// for a block that has ended, addresses outside shared memory.
//
// The layouts are those of hopper.h's sources: the fields of a descriptor from the PTX ISA's table "Matrix
// descriptor layout", the canonical layouts in units of 16 bytes from CUTLASS (mma_traits_sm90_gmma.hpp):
//   K-major, 128-byte swizzle:  Swizzle<3,4,3> o ((8, m), (T, 2)) : ((8 T, SBO), (1, T))
//   MN-major, 128-byte swizzle: Swizzle<3,4,3> o ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO))
// with the swizzle, bits 4-6 of the address xor its bits 7-9, for boxes and descriptors alike.
#pragma once

#include <map>
#include <set>

#include "emulator.h"

namespace emulator {

constexpr uint32_t kSharedBase = 1024;  // as on the device, addresses of dynamic shared memory start above 0
constexpr uint64_t kBarrierMark = 0x6D62617272696572ull;

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
  bool known = false;  // to the cluster and the copy engine
};

inline std::map<const void*, Barrier>& barriers() {
  static std::map<const void*, Barrier> all;
  return all;
}

inline Barrier& barrier_at(uint64_t* at) {
  const auto found = barriers().find(at);
  if (found == barriers().end()) fail("a barrier is used that nobody made");
  if (*at != kBarrierMark) fail("a barrier was written over");
  return found->second;
}

inline void turn(Barrier& b) {
  if (b.pending < 0) fail("more arrivals at a barrier than it counts");
  if (b.bytes >= 1 << 20 || b.bytes <= -(1 << 20)) fail("more bytes than a barrier counts");
  if (b.pending == 0 && b.bytes == 0) ++b.phase, b.pending = b.count;
}

// The same place in the shared memory of block `rank` of this cluster.
template <class P>
P* in_block(P* here, unsigned rank) {
  if (rank >= cluster->blocks.size()) fail("no such block in the cluster");
  Block& there = cluster->blocks[rank];
  if (there.left == 0) fail("something is sent to a block that has ended");
  const size_t offset = static_cast<size_t>(reinterpret_cast<unsigned char*>(here) - block->shared_begin);
  return reinterpret_cast<P*>(there.shared_begin + offset);
}

inline unsigned swizzle(unsigned address) { return address ^ ((address >> 7 & 7) << 4); }

// A product of one warp's 16 rows, on its way.
struct Product {
  bool narrow_bfloat16, slopes;
  int tiles;
  bool accumulate, read = false;
  uint64_t rows, columns;
  uint32_t a[kWarpSize][4];
  float* c[kWarpSize];
  std::vector<float> result;  // [16][8 tiles]
};

// Accumulators that products are under way to, and their value by then.
struct Running {
  int products = 0;
  std::vector<float> value;  // [lane][4 tiles]
};

struct WarpProducts {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;  // committed, oldest first
  std::map<float*, Running> running;         // by the first lane's accumulators
  std::set<float*> touched;                  // written by a wait, and no fence since
  bool fenced = false;
};

inline WarpProducts& own_products() {
  auto& mine = block->products[fiber->thread / kWarpSize];
  if (!mine) mine = std::make_shared<WarpProducts>();
  return *mine;
}

}  // namespace emulator

namespace tsynd {

// What the copy engine is told of a tensor; on the device the driver encodes it.
struct TensorMap {
  const unsigned char* base;
  uint64_t size[3], stride[2];
  uint32_t box[3];
};

template <class Boxed>
TensorMap tensor_map(const Boxed& tensor) {
  using emulator::fail;
  TensorMap map{static_cast<const unsigned char*>(tensor.base), {}, {}, {}};
  if (reinterpret_cast<uintptr_t>(tensor.base) % 16) fail("a tensor of boxes does not start on 16 bytes");
  for (int i = 0; i < 3; ++i) {
    map.size[i] = tensor.size[i];
    map.box[i] = tensor.box[i];
    if (map.size[i] == 0 || map.size[i] > 1ull << 32) fail("a size of a tensor of boxes");
    if (map.box[i] == 0 || map.box[i] > 256) fail("a size of a box");
  }
  for (int i = 0; i < 2; ++i) {
    map.stride[i] = tensor.stride[i];
    if (map.stride[i] % 16 || map.stride[i] >= 1ull << 40) fail("a stride of a tensor of boxes");
  }
  if (map.box[0] * 2 != 128) fail("the inner size of a box is not the swizzle's");
  return map;
}

inline uint32_t shared_address(const void* p) {
  return emulator::kSharedBase +
         static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::block->shared_begin);
}

inline void trap() { emulator::fail("trap"); }
inline int uniform_warp() { return static_cast<int>(emulator::fiber->thread) / emulator::kWarpSize; }
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void leave_registers() {}
inline int cluster_rank() { return static_cast<int>(emulator::block->rank); }

inline void sync_cluster() {
  using namespace emulator;
  meet(cluster->all, Kind::kClusterSync, block->rank * block->size.x + fiber->thread, nullptr, 0);
}
inline void sync_threads(int threads) {
  using namespace emulator;
  if (static_cast<int>(fiber->thread) >= threads) fail("a thread at a barrier of others");
  if (block->some.size == 0) prepare(block->some, static_cast<size_t>(threads));
  meet(block->some, Kind::kThreadsSync, fiber->thread, nullptr, 0);
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  using namespace emulator;
  if (reinterpret_cast<uintptr_t>(barrier) % 8) fail("a barrier is not aligned");
  std::memcpy(barrier, &kBarrierMark, 8);
  barriers()[barrier] = Barrier{arrivals, arrivals, 0, 0, false};
}
inline void publish_barriers() {
  using namespace emulator;
  for (auto& [at, barrier] : barriers())
    if (at >= block->shared_begin && at < block->shared_begin + block->shared_bytes) barrier.known = true;
}
inline void arrive_expecting(uint64_t* barrier, int bytes) {
  emulator::Barrier& b = emulator::barrier_at(barrier);
  b.bytes += bytes;
  --b.pending;
  emulator::turn(b);
}
inline void arrive_at(uint64_t* barrier, int rank) {
  emulator::Barrier& b = emulator::barrier_at(emulator::in_block(barrier, static_cast<unsigned>(rank)));
  if (!b.known) emulator::fail("a barrier is used before it was made known");
  --b.pending;
  emulator::turn(b);
}
inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
  using namespace emulator;
  if (parity > 1) fail("a parity is 0 or 1");
  while ((barrier_at(barrier).phase & 1) == parity) {
    fiber->waiting = true;
    yield();
  }
  fiber->waiting = false;
}

inline void load_box_into(unsigned char* to, const TensorMap& map, uint64_t* barrier, const int (&at)[3]) {
  using namespace emulator;
  const unsigned rows = map.box[1] * map.box[2];
  Block* const there = [&] {  // whose shared memory this is
    for (Block& b : cluster->blocks)
      if (to >= b.shared_begin && to + rows * 128 <= b.shared_begin + b.shared_bytes) return &b;
    fail("a box outside shared memory");
  }();
  if ((to - there->shared_begin) % 128) fail("a box does not start on 128 bytes");
  if (!barrier_at(barrier).known) fail("a barrier is used before it was made known");
  std::memset(to, 0xFF, rows * 128);
  cluster->in_flight.push_back([=, start = std::vector<int>(at, at + 3)] {
    if (there->left == 0) fail("a box for a block that has ended");
    for (unsigned row = 0; row < rows; ++row)
      for (unsigned piece = 0; piece < 8; ++piece) {
        unsigned char bytes[16] = {};
        const int64_t c1 = start[1] + static_cast<int64_t>(row % map.box[1]),
                      c2 = start[2] + static_cast<int64_t>(row / map.box[1]);
        for (unsigned e = 0; e < 8; ++e) {
          const int64_t c0 = start[0] + static_cast<int64_t>(8 * piece + e);
          if (c0 >= 0 && c1 >= 0 && c2 >= 0 && c0 < static_cast<int64_t>(map.size[0]) &&
              c1 < static_cast<int64_t>(map.size[1]) && c2 < static_cast<int64_t>(map.size[2]))
            std::memcpy(bytes + 2 * e, map.base + c1 * map.stride[0] + c2 * map.stride[1] + 2 * c0, 2);
        }
        const unsigned offset = static_cast<unsigned>(to - there->shared_begin) + row * 128 + 16 * piece;
        std::memcpy(there->shared_begin + swizzle(offset), bytes, 16);
      }
    Barrier& b = barrier_at(barrier);
    b.bytes -= rows * 128;
    turn(b);
  });
}
inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2) {
  load_box_into(static_cast<unsigned char*>(to), map, barrier, {c0, c1, c2});
}
inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2,
                     uint16_t blocks) {
  using namespace emulator;
  for (unsigned rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      load_box_into(in_block(static_cast<unsigned char*>(to), rank), map, in_block(barrier, rank),
                    {c0, c1, c2});
}

// Element (mn, k) of a tile that a descriptor names.
inline uint16_t tile_element(uint64_t descriptor, bool mn_major, unsigned mn, unsigned k) {
  using namespace emulator;
  const unsigned start = static_cast<unsigned>(descriptor & 0x3FFF) << 4,
                 leading = static_cast<unsigned>(descriptor >> 16 & 0x3FFF) << 4,
                 stride = static_cast<unsigned>(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  if (descriptor >> 49 & 7) fail("a descriptor with a base offset");
  const unsigned address =
      swizzle(mn_major ? start + mn % 64 * 2 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride
                       : start + mn % 8 * 128 + mn / 8 * stride + k * 2);
  if (address < kSharedBase || address + 2 > kSharedBase + block->shared_bytes)
    fail("a product reads outside shared memory");
  uint16_t out;
  std::memcpy(&out, block->shared_begin + (address - kSharedBase), 2);
  return out;
}

inline void read_product(emulator::Product& p, unsigned warp) {
  const auto value = [&](uint16_t bits) {
    return p.narrow_bfloat16 ? bfloat16_value(bits) : half_value(bits);
  };
  const int columns = 8 * p.tiles;
  std::vector<float> a(16 * 16), b(static_cast<size_t>(columns) * 16);
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned k = 0; k < 16; ++k) {
      if (p.slopes) {  // the fragments of m16n8k16
        const uint32_t word = p.a[4 * (row % 8) + k % 8 / 2][row / 8 + 2 * (k / 8)];
        a[row * 16 + k] = value(static_cast<uint16_t>(word >> (16 * (k & 1))));
      } else {
        a[row * 16 + k] = value(tile_element(p.rows, false, 16 * (warp % 4) + row, k));
      }
    }
  for (int n = 0; n < columns; ++n)
    for (unsigned k = 0; k < 16; ++k)
      b[static_cast<size_t>(n) * 16 + k] =
          value(tile_element(p.columns, p.slopes, static_cast<unsigned>(n), k));
  p.result.assign(static_cast<size_t>(16 * columns), 0.f);
  for (int row = 0; row < 16; ++row)
    for (int n = 0; n < columns; ++n) {
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[static_cast<size_t>(n) * 16 + k];
      p.result[static_cast<size_t>(row * columns + n)] = sum;
    }
  p.read = true;
}

struct ProductLane {
  float* c;
  uint32_t a[4];
  uint64_t rows, columns;
  int accumulate;
};

inline void issue_product(float* c, int tiles, const uint32_t* a, uint64_t rows, uint64_t columns,
                          bool accumulate, bool is_bfloat16) {
  using namespace emulator;
  ProductLane mine{c, {}, rows, columns, accumulate};
  if (a != nullptr) std::memcpy(mine.a, a, 16);
  static_assert(sizeof(mine) <= kSlotBytes);
  const unsigned warp = fiber->thread / kWarpSize;
  WarpProducts& products = own_products();
  meet(own_warp(), Kind::kProducts, own_lane(), &mine, sizeof(mine), [&](const unsigned char* all) {
    Product p{is_bfloat16, a != nullptr, tiles, accumulate, false, rows, columns, {}, {}, {}};
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      ProductLane its;
      std::memcpy(&its, all + lane * kSlotBytes, sizeof(its));
      if (its.rows != rows || its.columns != columns || its.accumulate != accumulate)
        fail("lanes disagree on a product");
      std::memcpy(p.a[lane], its.a, 16);
      p.c[lane] = its.c;
    }
    const size_t each = static_cast<size_t>(4 * tiles);
    if (!products.fenced) fail("a product before any wgmma.fence");
    if (p.slopes && !products.touched.empty()) fail("an operand in registers without wgmma.fence");
    Running& running = products.running[p.c[0]];
    if (running.products++ == 0) {
      if (products.touched.count(p.c[0])) fail("accumulators without wgmma.fence");
      for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        running.value.insert(running.value.end(), p.c[lane], p.c[lane] + each);
        std::fill(p.c[lane], p.c[lane] + each, NAN);
      }
    }
    if (draw() & 1) read_product(p, warp);
    products.open.push_back(std::move(p));
  });
}

inline void finish_product(emulator::WarpProducts& products, emulator::Product& p, unsigned warp) {
  using namespace emulator;
  if (!p.read) read_product(p, warp);
  Running& running = products.running[p.c[0]];
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    for (int j = 0; j < p.tiles; ++j)
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + 8 * (i / 2),
                       n = 8 * static_cast<unsigned>(j) + 2 * (lane % 4) + i % 2;
        float& value =
            running.value[lane * 4 * static_cast<unsigned>(p.tiles) + 4 * static_cast<unsigned>(j) + i];
        value = (p.accumulate ? value : 0.f) + p.result[row * 8 * static_cast<unsigned>(p.tiles) + n];
      }
  if (--running.products > 0) return;
  const size_t each = static_cast<size_t>(4 * p.tiles);
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    std::copy_n(running.value.begin() + static_cast<std::ptrdiff_t>(lane * each), each, p.c[lane]);
  products.running.erase(p.c[0]);
  products.touched.insert(p.c[0]);
}

inline void product_fence() {
  using namespace emulator;
  WarpProducts& products = own_products();
  meet(own_warp(), Kind::kProductFence, own_lane(), nullptr, 0, [&](const unsigned char*) {
    products.fenced = true;
    products.touched.clear();
  });
}
inline void commit_products() {
  using namespace emulator;
  WarpProducts& products = own_products();
  meet(own_warp(), Kind::kCommit, own_lane(), nullptr, 0, [&](const unsigned char*) {
    products.groups.push_back(std::move(products.open));
    products.open.clear();
  });
}
template <int kPending>
void wait_products() {
  using namespace emulator;
  WarpProducts& products = own_products();
  const unsigned warp = fiber->thread / kWarpSize;
  meet(own_warp(), Kind::kWait, own_lane(), nullptr, 0, [&](const unsigned char*) {
    while (products.groups.size() > kPending) {
      for (Product& p : products.groups.front()) finish_product(products, p, warp);
      products.groups.erase(products.groups.begin());
    }
  });
}
template <int kTiles>
void settle(float (&)[kTiles][4]) {}

template <class T, int kTiles>
void multiply_tiles(float (&c)[kTiles][4], uint64_t rows, uint64_t columns, bool accumulate) {
  issue_product(&c[0][0], kTiles, nullptr, rows, columns, accumulate, std::is_same_v<T, BFloat16>);
}
template <class T>
void multiply_slopes(float (&c)[8][4], const uint32_t (&a)[4], uint64_t columns, bool accumulate) {
  issue_product(&c[0][0], 8, a, 0, columns, accumulate, std::is_same_v<T, BFloat16>);
}

}  // namespace tsynd
