// One-line argument checks of the raw ops. They guard memory; the public functions of oodkern.ops
// check first, and say more.
#pragma once

#include "stable.h"

namespace oodkern {

inline bool is_floating(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void check_logits(const Tensor& logits, const char* name = "logits") {
  STD_TORCH_CHECK(logits.dim() >= 1, name, ": expected [..., K], got a tensor without dimensions");
  STD_TORCH_CHECK(is_floating(logits), name, ": expected float64, float32, bfloat16 or float16");
}

inline void check_same_shape(const Tensor& tensor, const char* name, const Tensor& like, const char* of = "logits") {
  STD_TORCH_CHECK(sizes_of(tensor) == sizes_of(like) && tensor.scalar_type() == like.scalar_type(), name,
                  ": expected the shape and dtype of ", of);
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& like, const char* of = "logits") {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of ", of);
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && is_floating(tensor), name,
                  ": expected a matrix of float64, float32, bfloat16 or float16");
}

inline void check_same_columns(const Tensor& tensor, const char* name, const Tensor& features) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(1) == features.size(1) && tensor.scalar_type() == features.scalar_type(), name,
      ": expected a matrix of as many columns, and in the dtype, as the first");
}

// In the dtype of the features or, of what they need not be rounded to, float32 beside 16-bit features.
inline bool goes_beside(const Tensor& tensor, const Tensor& features) {
  const ScalarType dtype = features.scalar_type();
  const bool halves = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  return tensor.scalar_type() == dtype || (halves && tensor.scalar_type() == ScalarType::Float);
}

inline void check_columns_beside(const Tensor& tensor, const char* name, const Tensor& features) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == features.size(1) && goes_beside(tensor, features), name,
                  ": expected a matrix of as many columns as the first, in its dtype or in float32 beside 16 bits");
}

inline void check_per_row(const Tensor& tensor, const char* name, const Tensor& logits, const char* of = "logits") {
  std::vector<int64_t> expected = sizes_of(logits);
  expected.pop_back();
  STD_TORCH_CHECK(sizes_of(tensor) == expected && tensor.scalar_type() == score_dtype(logits), name,
                  ": expected one number per row of ", of, ", in the dtype of the scores");
}

}  // namespace oodkern
