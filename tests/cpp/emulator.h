// Runs CUDA kernels on the host, one fiber per thread, for tests: the kernels' own code, its indices and its
// synchronisation, without a GPU. Blocks run one after another, those of a cluster side by side. Warps run
// ahead of one another, and lanes within a warp, at random; asynchronous copies land at a random one of their
// two lawful moments (at once, or when waited for), and fresh shared memory holds NaNs; so a missing barrier,
// a missing wait or a read of what nobody wrote shows as a wrong number. It says nothing of speed, of
// registers or of how the instructions themselves behave: they follow the PTX ISA's tables as read by us.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

enum class Kind : int {
  kNone,
  kShuffle,
  kWarpSync,
  kBlockSync,
  kLoadMatrices,
  kMultiply,
  kThreadsSync,  // the rest: emulator_hopper.h
  kClusterSync,
  kProductFence,
  kProducts,
  kCommit,
  kWait
};

constexpr int kWarpSize = 32;
constexpr size_t kSlotBytes = 64;
constexpr size_t kStackBytes = 256 * 1024;

// Threads that meet at a point; values deposited on arrival are kept while anybody may still read them.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned epoch = 0;
  Kind kind = Kind::kNone;
  std::vector<unsigned char> slots[2];
};

struct WarpProducts;  // emulator_hopper.h
struct Cluster;
struct Block;

struct Copy {
  void* to;
  unsigned char bytes[16];
};

// A context starts a fiber; from then on _setjmp and _longjmp switch, which make no system calls.
struct Fiber {
  ucontext_t context{};
  jmp_buf resume;
  Block* home = nullptr;
  unsigned thread = 0;
  bool started = false, done = false, waiting = false;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Block {
  Dim index, size, grid;
  unsigned rank = 0;  // in its cluster
  unsigned char* shared_begin = nullptr;
  size_t shared_bytes = 0, left = 0;  // left: threads that have not ended
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all, some;  // some: of the first threads
  std::vector<std::shared_ptr<WarpProducts>> products;
  Cluster* cluster = nullptr;
};

// Blocks that run side by side; a block by itself is a cluster of one.
struct Cluster {
  std::vector<Block> blocks;
  Meeting all;
  std::vector<std::function<void()>> in_flight;  // happen by themselves, at any moment and in any order
  std::function<void()> body;
  std::mt19937 random;
  ucontext_t scheduler{};
  jmp_buf resume;
};

inline Cluster* cluster = nullptr;
inline Block* block = nullptr;
inline Fiber* fiber = nullptr;

inline unsigned draw() { return static_cast<unsigned>(cluster->random()); }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, block ? block->index.x : 0u,
               fiber ? fiber->thread : 0u);
  std::abort();
}

inline void yield() {
  if (_setjmp(fiber->resume) == 0) _longjmp(cluster->resume, 1);
}

inline void run(Fiber& f) {
  fiber = &f;
  block = f.home;
  if (_setjmp(cluster->resume) == 0) {
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    setcontext(&f.context);
  }
  fiber = nullptr;
  block = nullptr;
}

// One stack per thread of a cluster, kept from cluster to cluster.
inline unsigned char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new unsigned char[kStackBytes]);
  return stacks[thread].get();
}

// Deposit `mine`, wait for everybody, return all deposits. The last one to come does `together` before
// anybody goes on.
template <class Together>
const unsigned char* meet(Meeting& meeting, Kind kind, unsigned position, const void* mine, size_t bytes,
                          const Together& together) {
  if (bytes > kSlotBytes) fail("a deposit is too large");
  const unsigned epoch = meeting.epoch;
  if (meeting.arrived == 0) meeting.kind = kind;
  if (meeting.kind != kind) fail("threads meet at different instructions");
  std::vector<unsigned char>& slots = meeting.slots[epoch & 1];
  if (bytes) std::memcpy(slots.data() + position * kSlotBytes, mine, bytes);
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.epoch;
    together(static_cast<const unsigned char*>(slots.data()));
    yield();
  } else {
    fiber->waiting = true;
    while (meeting.epoch == epoch) yield();
    fiber->waiting = false;
  }
  return slots.data();
}
inline const unsigned char* meet(Meeting& meeting, Kind kind, unsigned position, const void* mine,
                                 size_t bytes) {
  return meet(meeting, kind, position, mine, bytes, [](const unsigned char*) {});
}

inline Meeting& own_warp() { return block->warps[fiber->thread / kWarpSize]; }
inline unsigned own_lane() { return fiber->thread % kWarpSize; }

inline void land(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.bytes, 16);
  copies.clear();
}

inline void enter() {
  cluster->body();
  for (auto& group : fiber->groups) land(group);
  fiber->done = true;
  --block->left;
  yield();
}

inline void prepare(Meeting& meeting, size_t size) {
  meeting.size = static_cast<int>(size);
  for (auto& slots : meeting.slots) slots.assign(size * kSlotBytes, 0);
}

// One of what is in flight, whichever, happens now.
inline void happen() {
  const size_t which = draw() % cluster->in_flight.size();
  const std::function<void()> what = std::move(cluster->in_flight[which]);
  cluster->in_flight.erase(cluster->in_flight.begin() + static_cast<std::ptrdiff_t>(which));
  what();
}

__attribute__((noinline)) inline void make_fiber(Block& b, size_t thread, unsigned char* stack) {
  Fiber& f = b.fibers[thread];
  f.home = &b;
  f.thread = static_cast<unsigned>(thread);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = &b.cluster->scheduler;
  makecontext(&f.context, &enter, 0);
}

// A fiber for each thread, none started; returns the warps, by block and first thread.
inline std::vector<std::pair<Block*, size_t>> make_fibers(Cluster& c) {
  const size_t threads = c.blocks[0].size.x;
  std::vector<std::pair<Block*, size_t>> warps;
  for (size_t k = 0; k < c.blocks.size(); ++k) {
    Block& b = c.blocks[k];
    b.cluster = &c;
    b.rank = static_cast<unsigned>(k);
    b.left = threads;
    b.fibers = std::vector<Fiber>(threads);
    b.warps = std::vector<Meeting>((threads + kWarpSize - 1) / kWarpSize);
    b.products.resize(b.warps.size());
    for (size_t w = 0; w < b.warps.size(); ++w) {
      prepare(b.warps[w], std::min<size_t>(kWarpSize, threads - w * kWarpSize));
      warps.emplace_back(&b, w * kWarpSize);
    }
    prepare(b.all, threads);
    for (size_t i = 0; i < threads; ++i) make_fiber(b, i, stack_of(k * threads + i));
  }
  prepare(c.all, threads * c.blocks.size());
  return warps;
}

// Carry out the blocks of one cluster, whose shared memory is there already.
inline void run_cluster(Cluster& c) {
  cluster = &c;
  const size_t threads = c.blocks[0].size.x;
  const std::vector<std::pair<Block*, size_t>> warps = make_fibers(c);
  // A warp sprints ahead for a random while, its lanes at random paces; then another.
  size_t left = threads * c.blocks.size();
  const auto step = [&](Fiber& f) {  // whether the thread got anywhere
    if (f.done) return false;
    const bool waited = f.waiting;
    run(f);
    left -= f.done;
    return !(waited && f.waiting && !f.done);
  };
  std::vector<Fiber*> order;
  for (int idle = 0; left > 0;) {
    const auto [home, first] = warps[draw() % warps.size()];
    const size_t lanes = std::min<size_t>(threads - first, kWarpSize);
    order.clear();
    for (size_t i = 0; i < lanes; ++i) order.push_back(&home->fibers[first + i]);
    bool moved = true;
    for (unsigned rounds = draw() % 2 ? 2 : 1 + draw() % 400; rounds > 0 && moved; --rounds) {
      std::shuffle(order.begin(), order.end(), c.random);
      moved = false;
      const unsigned chosen = draw() | draw();
      for (size_t i = 0; i < lanes; ++i)
        if (chosen >> i & 1) moved |= step(*order[i]);
      if (!moved)
        for (Fiber* const f : order) moved |= step(*f);
      if (moved) idle = 0;
    }
    if (!c.in_flight.empty() && draw() % 8 == 0) happen();
    if (++idle > 100 * static_cast<int>(warps.size())) {
      if (c.in_flight.empty()) fail("threads wait for one another for ever");
      happen();
      idle = 0;
    }
  }
  if (!c.in_flight.empty()) fail("the blocks ended before their copies");
  cluster = nullptr;
}

// kernel<<<blocks, threads, shared_bytes>>>(arguments...) in clusters of `size` blocks, with `seed` choosing
// the order of the threads.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, unsigned seed,
            unsigned size, Arguments... arguments) {
  constexpr size_t kAlignment = 1024;
  using Memory = std::unique_ptr<unsigned char, void (*)(void*)>;
  if (blocks % size) fail("the grid is not a multiple of the cluster");
  for (unsigned first = 0; first < blocks; first += size) {
    Cluster c;
    c.random.seed(seed * 7919u + first);
    c.body = [=] { kernel(arguments...); };
    c.blocks.resize(size);
    std::vector<Memory> memories;
    for (unsigned k = 0; k < size; ++k) {
      // exactly as many bytes as asked for behind the aligned start, so that a sanitizer sees what runs over
      memories.emplace_back(
          static_cast<unsigned char*>(std::aligned_alloc(
              kAlignment, (shared_bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment)),
          &std::free);
      std::memset(memories[k].get(), 0xFF, shared_bytes + kAlignment);
      Block& b = c.blocks[k];
      b.index.x = first + k;
      b.size.x = threads;
      b.grid.x = blocks;
      b.shared_begin = memories[k].get();
      b.shared_bytes = shared_bytes;
    }
    run_cluster(c);
    for (const Memory& memory : memories)
      for (size_t k = 0; k < kAlignment / 2; ++k)
        if (memory.get()[shared_bytes + k] != 0xFF) {
          std::fprintf(stderr, "emulator: a write behind the %zu bytes of shared memory\n", shared_bytes);
          std::abort();
        }
  }
}

}  // namespace emulator

#define threadIdx (::emulator::Dim{::emulator::fiber->thread, 0, 0})
#define blockIdx (::emulator::block->index)
#define blockDim (::emulator::block->size)
#define gridDim (::emulator::block->grid)

namespace tsynd {

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct Half;
struct BFloat16;

// Round to nearest, ties to even.
inline uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline uint16_t half_bits(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float half_value(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
inline float to_float(float x) { return x; }

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i), source = (pick & 7) < 4 ? low : high;
    const uint32_t byte = (source >> (8 * (pick & 3))) & 0xFF;
    out |= ((pick & 8) ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return out;
}

inline float shuffle_xor(float x, int offset) {
  using namespace emulator;
  const unsigned char* all = meet(own_warp(), Kind::kShuffle, own_lane(), &x, 4);
  float out;
  std::memcpy(&out, all + (own_lane() ^ static_cast<unsigned>(offset)) * kSlotBytes, 4);
  return out;
}
inline uint32_t shuffle_xor(uint32_t x, int offset) {
  using namespace emulator;
  const unsigned char* all = meet(own_warp(), Kind::kShuffle, own_lane(), &x, 4);
  uint32_t out;
  std::memcpy(&out, all + (own_lane() ^ static_cast<unsigned>(offset)) * kSlotBytes, 4);
  return out;
}
inline void sync_warp() {
  using namespace emulator;
  meet(own_warp(), Kind::kWarpSync, own_lane(), nullptr, 0);
}
inline void sync_block() {
  using namespace emulator;
  meet(block->all, Kind::kBlockSync, fiber->thread, nullptr, 0);
}
inline unsigned char* shared_memory() { return emulator::block->shared_begin; }

inline void copy_async(void* to, const void* from, bool real) {
  using namespace emulator;
  if (reinterpret_cast<uintptr_t>(to) % 16 || (real && reinterpret_cast<uintptr_t>(from) % 16))
    fail("a 16-byte copy is not aligned");
  Copy copy{to, {}};
  if (real) std::memcpy(copy.bytes, from, 16);
  if (draw() & 1)
    std::memcpy(to, copy.bytes, 16);
  else
    fiber->open.push_back(copy);
}
inline void commit_copies() {
  using namespace emulator;
  fiber->groups.push_back(std::move(fiber->open));
  fiber->open.clear();
}
template <int kPending>
void wait_copies() {
  using namespace emulator;
  while (fiber->groups.size() > kPending) {
    land(fiber->groups.front());
    fiber->groups.erase(fiber->groups.begin());
  }
}

inline void load_matrices_as(uint32_t (&out)[4], const void* row, bool transposed) {
  using namespace emulator;
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row is not aligned");
  const unsigned char* all = meet(own_warp(), Kind::kLoadMatrices, own_lane(), &row, sizeof(row));
  const unsigned lane = own_lane();
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned r = transposed ? 2 * (lane % 4) + e : lane / 4,
                     c = transposed ? lane / 4 : 2 * (lane % 4) + e;
      const uint16_t* address;
      std::memcpy(&address, all + (8 * m + r) * kSlotBytes, sizeof(address));
      pair[e] = address[c];
    }
    out[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}
inline void load_matrices(uint32_t (&out)[4], const void* row) { load_matrices_as(out, row, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  load_matrices_as(out, row, true);
}

template <class T>
float narrow_value(uint16_t bits);
template <>
inline float narrow_value<Half>(uint16_t bits) {
  return half_value(bits);
}
template <>
inline float narrow_value<BFloat16>(uint16_t bits) {
  return bfloat16_value(bits);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulator;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* all = meet(own_warp(), Kind::kMultiply, own_lane(), mine, sizeof(mine));
  const auto half_of = [&](unsigned lane, unsigned reg, unsigned k) {
    uint32_t word;
    std::memcpy(&word, all + lane * kSlotBytes + 4 * reg, 4);
    return narrow_value<T>(static_cast<uint16_t>(word >> (16 * (k & 1))));
  };
  const unsigned lane = own_lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = 0.f;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned reader = (k % 8) / 2;
      sum += half_of(4 * (row % 8) + reader, row / 8 + 2 * (k / 8), k) *
             half_of(4 * column + reader, 4 + k / 8, k);
    }
    c[i] += sum;
  }
}

inline float quick_exp(float x) { return std::exp(x); }
inline float quick_log(float x) { return std::log(x); }
inline float quick_divide(float a, float b) { return a / b; }
inline float infinity() { return INFINITY; }

}  // namespace tsynd
