// Seeds of k-means, seen from their caller: plain pointers and sizes, compiled once per instruction set as the row
// engine is. `Real` is double where `wide`, float elsewhere.
#pragma once

#include "rows.h"

namespace oodkern {

struct SeedCall {
  bool wide;
  const void* distance;  // [N, N] Real, not negative, rows `stride` apart
  int64_t stride;
  bool wide_uniform;
  const void* uniform;  // [k, restarts, candidates] double where `wide_uniform`, float elsewhere; dense
  int64_t N, k, restarts, candidates;
  int64_t* seeds;  // [restarts, k]
};

// Restarts [begin, end) of the call.
using SeedEngine = void (*)(const SeedCall&, int64_t begin, int64_t end);

}  // namespace oodkern
