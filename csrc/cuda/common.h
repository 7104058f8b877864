// What the CUDA operators share: stream, device limits, dtype dispatch, matrix products by torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>

#include "../checks.h"
#include "image_row.cuh"

// CPU-only builds of torch lack it: declared weak, so that one module loads beside either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace tsynd {

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) (void)cudaGetLastError();  // not the next launch's
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
  return value;
}

// Of the tensor's device, asked for once.
inline const DeviceLimits& device_limits(const Tensor& tensor) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const int device = tensor.get_device_index();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceLimits limits{device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                      device_attribute(cudaDevAttrMultiProcessorCount, device), 0};
#if defined(TSYND_SM90A)  // else this build has nothing that only such a device runs
  limits.capability = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                      device_attribute(cudaDevAttrComputeCapabilityMinor, device);
#endif
  return known.emplace(device, limits).first->second;
}

// Call f with a null pointer of the storage type; check_dtype has refused others.
template <class F>
void with_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

template <class T>
const T* read_pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* read_pointer(const std::optional<Tensor>& tensor) {
  return tensor ? read_pointer<T>(*tensor) : nullptr;
}
template <class T>
T* write_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

// out = a b by torch's own matmul: cuBLAS, and TF32 where torch allows it. The out variant, which autocast
// leaves alone.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
}

inline Tensor rows_of(const Tensor& tensor, int64_t first, int64_t count) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 0, first, count);
}

inline RowTask row_task(int64_t samples, int64_t classes, Objective objective, Task task) {
  STD_TORCH_CHECK(samples <= 1 << 24 && classes <= 1 << 24, "samples and classes: got ", samples, " and ",
                  classes, ", wanted at most 2^24");
  return {static_cast<int>(samples), static_cast<int>(classes), objective == Objective::kEntropy,
          task == Task::kMultilabel};
}

}  // namespace tsynd
