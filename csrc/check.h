// One-line argument checks of the raw ops. They guard memory; the public functions of oodkern.ops
// check first, and say more.
#pragma once

#include "stable.h"

namespace oodkern {

inline void check_logits(const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() >= 1, "logits: expected [..., K], got a tensor without dimensions");
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "logits: expected float64, float32, bfloat16 or float16");
}

inline void check_same_shape(const Tensor& tensor, const char* name, const Tensor& logits) {
  STD_TORCH_CHECK(sizes_of(tensor) == sizes_of(logits) && tensor.scalar_type() == logits.scalar_type(), name,
                  ": expected the shape and dtype of logits");
}

inline void check_per_row(const Tensor& tensor, const char* name, const Tensor& logits) {
  std::vector<int64_t> expected = sizes_of(logits);
  expected.pop_back();
  STD_TORCH_CHECK(sizes_of(tensor) == expected && tensor.scalar_type() == score_dtype(logits), name,
                  ": expected one number per row of logits, in the dtype of the scores");
}

}  // namespace oodkern
