// The column sums and the gradients of CLUB, seen from their caller: plain pointers and sizes, compiled once per
// instruction set as the row engine is. `Real` is double for float64 storage and float for all others.
#pragma once

#include "rows.h"

namespace oodkern {

// Three matrices [N, D] in one storage, each with its rows `..._stride` elements apart.
struct ClubCall {
  Storage storage;
  const void* mean;
  const void* log_variance;
  const void* target;
  int64_t mean_stride;
  int64_t log_variance_stride;
  int64_t target_stride;
};

// Rows [row, row_end) and columns [column, column_end).
struct ClubPart {
  int64_t row, row_end;
  int64_t column, column_end;
};
constexpr int64_t kClubColumns = 128;  // of a part, at most

// What is added up over rows of each column, with w = exp(-log_variance), d = target - center, e = mean - center.
struct ClubSums {
  double* d;         // [D] of d
  double* square;    // [D] of d^2
  double* weight;    // [D] of w
  double* mean;      // [D] of e w
  double* contrast;  // [D] of (d e - d^2 / 2) w
};

// Per column, Real [D]: the mean of the target in two parts, its variance, the means of w and of (mean - ybar) w.
struct ClubColumns {
  const void* center;
  const void* rest;
  const void* variance;
  const void* weight;
  const void* mean;
};

// Dense [N, D] in the storage of the call, or null where not asked for; `columns` is D.
struct ClubGradients {
  int64_t columns;
  void* mean;
  void* log_variance;
  void* target;
};

struct ClubEngine {
  void (*totals)(const ClubCall&, const ClubPart&, double* sums);  // [D] of the target
  void (*sums)(const ClubCall&, const ClubPart&, const void* center, const ClubSums&);
  // `scale` is the upstream over N.
  void (*gradients)(const ClubCall&, const ClubPart&, const ClubColumns&, double scale, const ClubGradients&);
};

}  // namespace oodkern
