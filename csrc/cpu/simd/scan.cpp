// Binary searches side by side. Compiled once per instruction set.
#include "../scan.h"
#include "math.h"

namespace oodkern::OODKERN_ISA {
namespace {

// The smallest float that is not below x: a float is below x exactly when it is below that, so that sorted floats are
// compared with a sum that was formed in double.
OODKERN_INLINE float up(double x) {
  const float nearest = float(x);
  const int32_t bits = __builtin_bit_cast(int32_t, nearest);
  const float next = __builtin_bit_cast(float, bits < 0 ? bits - 1 : bits + 1);
  return double(nearest) < x ? next : nearest;
}
OODKERN_INLINE void threshold(double x, float* out) {
  *out = up(x);
}
OODKERN_INLINE void threshold(double x, double* out) {
  *out = x;
}

// One step of all searches after the other: a step is then a gather, a comparison and an addition of whole vectors,
// whose latencies overlap.
constexpr int64_t kSearches = 64;

template <class Real>
void count_below(const HingeCall& call, int64_t begin, int64_t end, int32_t* counts) {
  const Real* sorted = static_cast<const Real*>(call.sorted);
  const Real* scores = static_cast<const Real*>(call.scores);
  alignas(64) Real x[kSearches];
  alignas(64) int32_t place[kSearches];
  for (int64_t first = begin; first < end; first += kSearches) {
    const int64_t size = end - first < kSearches ? end - first : kSearches;
#pragma omp simd
    for (int64_t k = 0; k < size; ++k) threshold(call.sign * double(scores[first + k]) + call.margin, x + k);
    for (int64_t k = size; k < kSearches; ++k) x[k] = 0;
    for (int64_t k = 0; k < kSearches; ++k) place[k] = 0;
    for (int32_t step = int32_t(call.levels / 2); step > 0; step /= 2) {
#pragma omp simd
      for (int64_t k = 0; k < kSearches; ++k) place[k] += sorted[place[k] + step - 1] < x[k] ? step : 0;
    }
    for (int64_t k = 0; k < size; ++k) counts[first - begin + k] = place[k];
  }
}

void run_count_below(const HingeCall& call, int64_t begin, int64_t end, int32_t* counts) {
  call.wide ? count_below<double>(call, begin, end, counts) : count_below<float>(call, begin, end, counts);
}

}  // namespace

extern const ScanEngine scan_engine;
const ScanEngine scan_engine{run_count_below};

}  // namespace oodkern::OODKERN_ISA
