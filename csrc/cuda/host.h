// The host's side of a CUDA room: the tensor's device and PyTorch's current stream on it, for launches that are checked
// and never waited for, so that a CUDA graph can capture them. Rooms register raw ops with OODKERN_CUDA_OPS(m) and
// allocate with empty_of. Where the kernels are emulated, tests/emulator brings the same names.
#pragma once

#include "../stable.h"

#if defined(OODKERN_EMULATED)
#include "emulated_host.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define OODKERN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(oodkern, CUDA, m)

namespace oodkern {

class CudaStream {
 public:
  explicit CudaStream(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int64_t multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // The shared memory that a block can have.
  int64_t shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // `name` is the kernel's, for the emulator.
  template <class... Parameters, class... Arguments>
  void launch(const char* /*name*/, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t dynamic_bytes,
              Arguments... arguments) const {
    constexpr int64_t kWithoutAsking = 40 << 10;  // of 48 KB, which a kernel's static shared memory is a part of
    if (dynamic_bytes > kWithoutAsking) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_bytes)));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = unsigned(blocks);
    config.blockDim = unsigned(threads);
    config.dynamicSmemBytes = size_t(dynamic_bytes);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;

  int64_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
};

}  // namespace oodkern
#endif
