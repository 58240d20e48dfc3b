// What the ops of room `linear_energy` share: the head that makes logits, the kinds of scores, the gradients asked for.
#pragma once

#include <string>

#include "../check.h"
#include "walk.h"

namespace oodkern {

struct LinearHead {
  Operand x, w;
  bool wide;
  Workspace workspace;
  void* bias = nullptr;  // [K] Real, or null

  LinearHead(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& b)
      : x(features, product_storage(storage_of(features), storage_of(weight))),
        w(weight, x.read()),
        wide(x.read() == Storage::kFloat64),
        workspace(features) {
    if (b) bias = row_of(*b);
  }
  // One row of numbers as Real, dense.
  void* row_of(const Tensor& tensor) {
    const Column column = as_column(tensor);
    void* out = workspace.take(w.rows() * (wide ? 8 : 4) + 8);
    const Storage stored = storage_of(tensor);
    const char* from = static_cast<const char*>(column.data());
    for (int64_t k = 0; k < w.rows(); ++k) {
      tile_engine().widen(stored, from + k * column.stride * bytes_of(stored), 1,
                          static_cast<char*>(out) + k * (wide ? 8 : 4));
    }
    return out;
  }
};

struct Kind {
  Reduce reduce;
  double sign;
};
inline Kind kind_of(const std::string& score, double temperature) {
  STD_TORCH_CHECK(score == "energy" || score == "joint_energy", "score: expected energy or joint_energy, got ", score);
  if (score == "energy") return {{Reduction::kLogSumExp, temperature}, -1.0};
  return {{Reduction::kSoftplusSum, 1.0}, 1.0};
}

inline void check_head(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_matrix(features, "features");
  check_same_columns(weight, "weight", features);
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == features.scalar_type(),
        "bias: expected [K] in the dtype of features");
  }
}

// The same where weight and bias may be float32 beside 16-bit features.
inline void check_mixed_head(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_matrix(features, "features");
  check_columns_beside(weight, "weight", features);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && goes_beside(*bias, features),
                    "bias: expected [K] in the dtype of features, or in float32 beside 16 bits");
  }
}

inline void* real_at(const Tensor& tensor, int64_t i) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + i * int64_t(tensor.element_size());
}

Tensor linear_score(std::string score, const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias,
                    double temperature);

struct Wanted {
  Gradient features, weight;
  Tensor bias;
  std::vector<double> bias_sums;

  Wanted(const Tensor& x, const Tensor& w, bool for_features, bool for_weight, bool for_bias) {
    features.result = gradient_of(x, for_features);
    weight.result = gradient_of(w, for_weight);
    bias = empty_of(w, {for_bias ? w.size(0) : 0}, w.scalar_type());
    if (for_bias) bias_sums.resize(w.size(0));
  }
  void into(Walk& walk, bool for_features, bool for_weight) {
    if (for_features) walk.dx = &features;
    if (for_weight) walk.dw = &weight;
    if (!bias_sums.empty()) walk.column_sum = bias_sums.data();
  }
  void finish_bias(bool wide) {
    for (size_t k = 0; k < bias_sums.size(); ++k) {
      const float single = float(bias_sums[k]);
      const void* sum = wide ? static_cast<const void*>(&bias_sums[k]) : &single;
      tile_engine().narrow(storage_of(bias), sum, 1, real_at(bias, int64_t(k)));
    }
  }
};

}  // namespace oodkern
