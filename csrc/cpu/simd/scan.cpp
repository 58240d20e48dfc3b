// Binary searches side by side, and comparisons with a threshold. Compiled once per instruction set.
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

// Scores that are looked at together: mostly none survives, and then one comparison of all is all there is.
constexpr int64_t kTogether = 256;

template <class Math, class Stored>
int64_t survivors(const SurvivorCall& call, int64_t begin, int64_t end, int32_t* places, void* keys, int64_t* nans) {
  using Real = typename Math::Real;
  const Stored* scores = static_cast<const Stored*>(call.scores);
  const Real sign = Real(call.sign), threshold = Real(call.threshold);
  const bool ties = call.ties;
  const auto survives = [&](Real x) { return (x > threshold) | (ties & (x == threshold)); };
  int64_t count = 0;
  for (int64_t first = begin; first < end; first += kTogether) {
    const int64_t size = end - first < kTogether ? end - first : kTogether;
    int32_t hits = 0, unordered = 0;
#pragma omp simd reduction(+ : hits, unordered)
    for (int64_t k = 0; k < size; ++k) {
      const Real x = sign * load(scores[first + k]);
      hits += survives(x) ? 1 : 0;
      unordered += x != x ? 1 : 0;
    }
    *nans += unordered;
    for (int64_t k = 0; hits > 0 && k < size; ++k) {
      const Real x = sign * load(scores[first + k]);
      if (!survives(x)) continue;
      static_cast<Real*>(keys)[count] = x;
      places[count++] = int32_t(first + k - begin);
    }
  }
  return count;
}

int64_t run_survivors(const SurvivorCall& call, int64_t begin, int64_t end, int32_t* places, void* keys,
                      int64_t* nans) {
  switch (call.storage) {
    case Storage::kFloat64: return survivors<Double, double>(call, begin, end, places, keys, nans);
    case Storage::kBFloat16: return survivors<Float, BFloat16>(call, begin, end, places, keys, nans);
    case Storage::kFloat16: return survivors<Float, Float16>(call, begin, end, places, keys, nans);
    default: return survivors<Float, float>(call, begin, end, places, keys, nans);
  }
}

}  // namespace

extern const ScanEngine scan_engine;
const ScanEngine scan_engine{run_count_below, run_survivors};

}  // namespace oodkern::OODKERN_ISA
