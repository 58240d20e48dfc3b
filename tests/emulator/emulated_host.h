// The host's side of a CUDA room where kernels are emulated: what csrc/cuda/host.h is for a GPU.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../../csrc/stable.h"

// A key that no other library of the process has kernels for: tests call it by name.
#define OODKERN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(oodkern, PrivateUse1, m)

namespace emulator {

struct Device {
  int64_t multiprocessors = 4;
  int64_t shared_bytes = 227 << 10;
  int64_t most_blocks = 24;  // of a launch: more would repeat what these do, and kernels walk over what is left
};
inline Device device;

}  // namespace emulator

namespace oodkern {

class CudaStream {
 public:
  explicit CudaStream(const Tensor&) {}

  int64_t multiprocessors() const { return emulator::device.multiprocessors; }
  int64_t shared_bytes() const { return emulator::device.shared_bytes; }

  template <class... Parameters, class... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t dynamic_bytes,
              Arguments... arguments) const {
    emulator::launch(name, kernel, unsigned(std::min(blocks, emulator::device.most_blocks)), unsigned(threads),
                     size_t(dynamic_bytes), Parameters(arguments)...);
  }
};

}  // namespace oodkern
