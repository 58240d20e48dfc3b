// One call of the row engine, as every device's takes it, and the CPU's engine: it reduces, differentiates or
// differentiates twice a range of rows. Plain pointers and sizes only, so that the CPU engine's translation unit can be
// compiled once per instruction set without sharing an inline function with any other.
#pragma once

#include <cstdint>

namespace oodkern {

enum class Reduction { kLogSumExp, kSoftplusSum, kAbsSum, kNorm };
enum class Pass { kForward, kBackward, kDoubleBackward };
enum class Storage { kFloat64, kFloat32, kBFloat16, kFloat16 };

// N rows of K logits. `Real` below is double for float64 storage and float for all others; every
// score is Real, every tensor of the logits' shape has the logits' storage.
struct RowCall {
  Reduction reduction;
  Pass pass;
  Storage storage;
  double temperature;  // of LogSumExp
  double sign;         // the score is sign * reduction
  int64_t columns;     // K

  const void* logits;  // [N, K], rows logits_stride apart
  int64_t logits_stride;
  void* score;  // [N] Real, written by the forward pass

  const void* saved_score;  // [N] Real, what the forward pass wrote; read where a slope needs it
  int64_t saved_score_stride;
  const void* grad_score;  // [N] Real, elements grad_score_stride apart
  int64_t grad_score_stride;
  void* grad_logits;  // [N, K] dense: sign * grad_score * slope, or its derivative in the logits

  const void* cotangent;  // [N, K], rows cotangent_stride apart: of the first grad_logits
  int64_t cotangent_stride;
  void* grad_grad_score;  // [N] Real
};

// Rows [begin, end) of the call.
using RowEngine = void (*)(const RowCall&, int64_t begin, int64_t end);

}  // namespace oodkern
