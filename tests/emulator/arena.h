// Memory that raw ops are given and ask for while the emulator runs them: all of it between guards.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "memory.h"

namespace emulator {

class Arena {
 public:
  size_t offset = 0;  // bytes behind a multiple of 16 at which the next results begin

  void* place(std::string name, size_t bytes, size_t behind, const void* content) {
    buffers_.push_back(std::make_unique<Buffer>(std::move(name), bytes, behind, content));
    return buffers_.back()->data();
  }

  // Throws where something was stored outside of what was placed.
  void check() {
    for (const auto& buffer : buffers_) buffer->finish();
  }
  void clear() { buffers_.clear(); }

 private:
  std::vector<std::unique_ptr<Buffer>> buffers_;
};
inline Arena arena;

inline torch::stable::Tensor empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                   torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  size_t bytes = torch::stable::new_empty(like, {0}, dtype).element_size();
  for (const int64_t size : sizes) bytes *= size_t(size);
  void* data = arena.place("a result of " + std::to_string(bytes) + " bytes", bytes, arena.offset, nullptr);
  return torch::stable::from_blob(data, {sizes.data(), sizes.size()}, {strides.data(), strides.size()}, like.device(),
                                  dtype);
}

}  // namespace emulator
