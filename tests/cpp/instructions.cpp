// One instruction of the emulator at a time, on raw registers and shared memory from standard input, for a
// test that compares it with other people's reading of the PTX ISA (tests/ops/test_instructions.py).
#include <iostream>
#include <iterator>

#include "../../csrc/cuda/hopper.h"

namespace {

using namespace tsynd;
using Bytes = std::vector<unsigned char>;

template <class Value>
Value take(const Bytes& in, size_t index) {
  Value out;
  std::memcpy(&out, in.data() + index * sizeof(Value), sizeof(Value));
  return out;
}

template <class Value>
void give(const std::vector<Value>& out) {
  std::fwrite(out.data(), sizeof(Value), out.size(), stdout);
}

// in: a lane's a[4], b[2] and c[4], 32 times; out: its c[4].
template <class T>
void multiply_add_kernel(const Bytes* in, std::vector<float>* out) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4];
  for (unsigned i = 0; i < 4; ++i) a[i] = take<uint32_t>(*in, 10 * lane + i);
  float c[4];
  for (unsigned i = 0; i < 4; ++i) c[i] = take<float>(*in, 10 * lane + 6 + i);
  multiply_add<T>(c, a, take<uint32_t>(*in, 10 * lane + 4), take<uint32_t>(*in, 10 * lane + 5));
  for (unsigned i = 0; i < 4; ++i) (*out)[4 * lane + i] = c[i];
}

// in: shared memory, then 32 byte offsets of rows; out: a lane's four registers.
void load_matrices_kernel(const Bytes* in, std::vector<uint32_t>* out, size_t bytes, bool transposed) {
  const unsigned lane = threadIdx.x;
  std::memcpy(shared_memory() + lane * (bytes / 32), in->data() + lane * (bytes / 32), bytes / 32);
  sync_block();
  const unsigned char* const row = shared_memory() + take<uint32_t>(*in, bytes / 4 + lane);
  uint32_t x[4];
  if (transposed)
    load_matrices_transposed(x, row);
  else
    load_matrices(x, row);
  for (unsigned i = 0; i < 4; ++i) (*out)[4 * lane + i] = x[i];
}

// in: shared memory, a K-major tile of 64 rows from 0 and one of columns from 8192; 64 values of k each. out:
// a thread's accumulators of all of k, the first product not accumulating.
template <class T, int kTiles>
void tiles_kernel(const Bytes* in, std::vector<float>* out) {
  const size_t thread = threadIdx.x, share = in->size() / 128;
  std::memcpy(shared_memory() + thread * share, in->data() + thread * share, share);
  sync_block();
  float c[kTiles][4];
  for (auto& tile : c)
    for (float& x : tile) x = NAN;
  product_fence();
  const uint64_t rows = tile_descriptor(shared_memory()), columns = tile_descriptor(shared_memory() + 8192);
  for (int k = 0; k < 4; ++k)
    multiply_tiles<T, kTiles>(c, rows + descriptor_step(32 * k), columns + descriptor_step(32 * k), k > 0);
  commit_products();
  wait_products<0>();
  std::memcpy(out->data() + thread * 4 * kTiles, c, sizeof(c));
}

// in: shared memory, an MN-major tile [64 of k][64], then a thread's a[4] of four steps of 16 of k. out: its
// accumulators.
template <class T>
void slopes_kernel(const Bytes* in, std::vector<float>* out) {
  constexpr size_t kTile = 64 * 128;
  const size_t thread = threadIdx.x, share = kTile / 128;
  std::memcpy(shared_memory() + thread * share, in->data() + thread * share, share);
  sync_block();
  float c[8][4];
  product_fence();
  const uint64_t columns = tile_descriptor(shared_memory());
  for (int k = 0; k < 4; ++k) {
    uint32_t a[4];
    for (size_t i = 0; i < 4; ++i)
      a[i] = take<uint32_t>(*in, kTile / 4 + (thread * 4 + static_cast<size_t>(k)) * 4 + i);
    multiply_slopes<T>(c, a, columns + descriptor_step(k * 16 * 128), k > 0);
  }
  commit_products();
  wait_products<0>();
  std::memcpy(out->data() + thread * 32, c, sizeof(c));
}

// in: 11 numbers (sizes, strides in bytes, box, coordinates), then the tensor; out: shared memory with the
// box.
void box_kernel(const Bytes* in, Bytes* out) {
  int64_t n[11];
  for (size_t i = 0; i < 11; ++i) n[i] = take<int64_t>(*in, i);
  const BoxedTensor tensor{
      in->data() + 128,
      {static_cast<uint64_t>(n[0]), static_cast<uint64_t>(n[1]), static_cast<uint64_t>(n[2])},
      {static_cast<uint64_t>(n[3]), static_cast<uint64_t>(n[4])},
      {static_cast<uint32_t>(n[5]), static_cast<uint32_t>(n[6]), static_cast<uint32_t>(n[7])},
      true};
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory() + out->size());
  barrier_init(barrier, 1);
  publish_barriers();
  const int bytes = static_cast<int>(n[5] * n[6] * n[7] * 2);
  arrive_expecting(barrier, bytes);
  load_box(shared_memory(), tensor_map(tensor), barrier, static_cast<int>(n[8]), static_cast<int>(n[9]),
           static_cast<int>(n[10]));
  wait_barrier(barrier, 0);
  std::memcpy(out->data(), shared_memory(), out->size());
}

template <class T>
int run(const std::string& what, const Bytes& in) {
  if (what == "multiply_add") {
    std::vector<float> out(128);
    emulator::launch(multiply_add_kernel<T>, 1, 32, 0, 1, 1, &in, &out);
    return give(out), 0;
  }
  if (what == "tiles128" || what == "tiles256") {
    const bool wide = what == "tiles256";
    std::vector<float> out(128 * (wide ? 128 : 64));
    emulator::launch(wide ? tiles_kernel<T, 32> : tiles_kernel<T, 16>, 1, 128, in.size(), 1, 1, &in, &out);
    return give(out), 0;
  }
  if (what == "slopes") {
    std::vector<float> out(128 * 32);
    emulator::launch(slopes_kernel<T>, 1, 128, 8192, 1, 1, &in, &out);
    return give(out), 0;
  }
  if (what == "load_matrices" || what == "load_matrices_transposed") {
    const size_t bytes = in.size() - 128;
    std::vector<uint32_t> out(128);
    emulator::launch(load_matrices_kernel, 1, 32, bytes, 1, 1, &in, &out, bytes,
                     what == "load_matrices_transposed");
    return give(out), 0;
  }
  if (what == "box") {
    Bytes out(static_cast<size_t>(take<int64_t>(in, 5) * take<int64_t>(in, 6) * take<int64_t>(in, 7) * 2));
    emulator::launch(box_kernel, 1, 1, out.size() + 8, 1, 1, &in, &out);
    return give(out), 0;
  }
  std::cerr << "no instruction " << what << "\n";
  return 2;
}

}  // namespace

// instructions INSTRUCTION bf16|f16 < registers and memory > registers and memory
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const Bytes in{std::istreambuf_iterator<char>(std::cin), {}};
  return argv[2] == std::string("bf16") ? run<BFloat16>(argv[1], in) : run<Half>(argv[1], in);
}
