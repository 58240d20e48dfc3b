// One call of the training heads, as every device's engine takes it, and the CPU's: plain pointers and sizes, as in
// rows.h.
#pragma once

#include "rows.h"

namespace oodkern {

// A loss of a row of logits z, of its softmax p, and its slope in z_k:
//   kUniform    logsumexp(z) - mean_c z_c                   p_k - 1 / K
//   kEnergyIn   relu(E - margin)^2 with E = -logsumexp(z)   -2 relu(E - margin) p_k
//   kEnergyOut  relu(margin - E)^2                          2 relu(margin - E) p_k
//   kBinary     mean_c softplus(z_c) - y_c z_c              (sigmoid(z_k) - y_k) / K
enum class Head { kUniform, kEnergyIn, kEnergyOut, kBinary };

// How targets y of kBinary lie in memory.
enum class Target { kFloat64, kFloat32, kBFloat16, kFloat16, kUint8, kInt8, kInt16, kInt32, kInt64 };

// N rows of K logits. `Real` is double for float64 storage and float for all others.
struct HeadCall {
  Head head;
  Storage storage;
  Target target_storage;
  double margin;
  int64_t columns;  // K

  const void* logits;  // [N, K], rows logits_stride apart
  int64_t logits_stride;
  const void* target;  // [N, K], rows target_stride apart; kBinary alone
  int64_t target_stride;

  void* value;  // [N] Real; null in the backward pass
  void* rows;   // [N, 3] Real, dense: maximum and reciprocal sum of the softmax, and what multiplies p in the slope

  const void* grad_value;  // [N] Real, elements grad_value_stride apart; null without grad_logits
  int64_t grad_value_stride;
  void* grad_logits;  // [N, K] dense, in the logits' storage; null where it is not asked for

  const void* foreseen;  // [N] Real: what grad_logits is formed for, in a backward pass that mends it; null elsewhere
  int64_t foreseen_stride;
};

// Rows [begin, end): value and rows, and grad_logits where it is there; grad_logits from rows in the backward pass.
using HeadEngine = void (*)(const HeadCall&, int64_t begin, int64_t end);

}  // namespace oodkern
