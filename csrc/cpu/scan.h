// Loops over many scores, seen from their callers: plain pointers and sizes, compiled once per instruction set as the
// row engine is. `Real` is double where `wide`, float elsewhere.
#pragma once

#include "rows.h"

namespace oodkern {

// The scores of one pairwise hinge that are gone through; the others have been sorted.
struct HingeCall {
  bool wide;
  const void* sorted;  // [levels - 1] Real, ascending, filled up with +inf; levels is a power of two
  int64_t levels;
  const void* scores;  // Real, dense
  double sign;         // of the scores
  double margin;
};

// Scores that may be among the best: sign * score is above the threshold, or equals it where `ties`.
struct SurvivorCall {
  Storage storage;
  const void* scores;  // dense
  double sign;
  double threshold;
  bool ties;
};

struct ScanEngine {
  // For each score x = sign * score + margin of [begin, end): how many sorted numbers are below it.
  void (*count_below)(const HingeCall&, int64_t begin, int64_t end, int32_t* counts);
  // How many of [begin, end) survive: their places, less begin, in ascending order, and sign * score of each, Real.
  // Adds how many NaN there were, which never survive.
  int64_t (*survivors)(const SurvivorCall&, int64_t begin, int64_t end, int32_t* places, void* keys, int64_t* nans);
};

}  // namespace oodkern
