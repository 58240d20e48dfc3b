// The only file that knows the LibTorch stable ABI: what the rest of csrc needs of a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/rows.h"
#if defined(OODKERN_EMULATED)
#include "arena.h"
#endif

namespace oodkern {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
#if defined(OODKERN_EMULATED)
  return emulator::empty(like, sizes, dtype);  // between guards
#else
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
#endif
}

// A gradient's memory, or a tensor without elements where it was not asked for.
inline Tensor gradient_of(const Tensor& tensor, bool asked) {
  return empty_of(tensor, asked ? sizes_of(tensor) : std::vector<int64_t>{0}, tensor.scalar_type());
}

// PyTorch's own sort of one dimension, ascending and stable: the sorted numbers, and where they came from.
inline std::tuple<Tensor, Tensor> sorted(const Tensor& tensor) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(tensor), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Scores and norms are float32 for every input dtype but float64.
inline ScalarType score_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The leading `count` dimensions of a tensor, read as one: their common stride, or -1 when they have none.
inline int64_t common_stride(const Tensor& tensor, int64_t count) {
  int64_t stride = -1;   // of the dimensions read so far, last first
  int64_t expected = 0;  // stride the next dimension must have
  for (int64_t d = count - 1; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (stride < 0) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != expected) {
      return -1;
    }
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride < 0 ? 0 : stride;
}

inline Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Storage::kFloat64;
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kFloat16;
    default: return Storage::kFloat32;
  }
}
inline Storage storage_of(const Tensor& tensor) {
  return storage_of(tensor.scalar_type());
}

// A tensor [..., K] read as [N, K] with dense rows; copied only when its strides do not allow it.
struct Rows {
  Tensor tensor;    // owns the memory
  int64_t rows;     // N
  int64_t columns;  // K
  int64_t stride;   // elements between rows; 0 for an expanded tensor

  const void* data() const { return tensor.const_data_ptr(); }
};

inline Rows as_rows(const Tensor& tensor) {
  const int64_t leading = tensor.dim() - 1;
  const int64_t columns = tensor.size(leading);
  int64_t rows = 1;
  for (int64_t d = 0; d < leading; ++d) rows *= tensor.size(d);
  const bool dense = columns <= 1 || tensor.stride(leading) == 1;
  const int64_t stride = common_stride(tensor, leading);
  if (dense && stride >= 0) return {tensor, rows, columns, stride};
  return {torch::stable::contiguous(tensor), rows, columns, columns};
}

// A tensor [...] read as [N]: one number a row.
struct Column {
  Tensor tensor;
  int64_t stride;

  const void* data() const { return tensor.const_data_ptr(); }
};

inline Column as_column(const Tensor& tensor) {
  const int64_t stride = common_stride(tensor, tensor.dim());
  if (stride >= 0) return {tensor, stride};
  return {torch::stable::contiguous(tensor), 1};
}

}  // namespace oodkern
