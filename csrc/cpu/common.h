// What the CPU operators share: aligned scratch, bfloat16 conversion, matrix products by torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>

#include "../checks.h"
#include "kernels.h"

namespace tsynd {

using torch::headeronly::BFloat16;

// Uninitialised floats on a cache line boundary.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(count) * 4 + 127) / 64 * 64)),
              &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  std::unique_ptr<float, void (*)(void*)> data_;
};

// A row-major float32 matrix somewhere in memory; `transposed` swaps its axes without moving data.
struct Matrix {
  float* data;
  int64_t rows, columns, stride;
  bool transposed = false;
};

// out = a b by torch's own matmul. Wrapped pointers carry no autograd state, so worker threads may call it;
// inside parallel_for it runs on the calling thread alone.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b) {
  static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const auto wrap = [](const Matrix& m) {
    const std::array<int64_t, 2> sizes{m.transposed ? m.columns : m.rows, m.transposed ? m.rows : m.columns};
    const std::array<int64_t, 2> strides{m.transposed ? 1 : m.stride, m.transposed ? m.stride : 1};
    return torch::stable::from_blob(m.data, {sizes.data(), 2}, {strides.data(), 2}, cpu, ScalarType::Float);
  };
  std::array<StableIValue, 3> stack{torch::stable::detail::from(wrap(a)),
                                    torch::stable::detail::from(wrap(b)),
                                    torch::stable::detail::from(wrap(out))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
}

inline Tensor as_float(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
}

inline Tensor new_values(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

}  // namespace tsynd
