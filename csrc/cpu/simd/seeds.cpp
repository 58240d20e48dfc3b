// Greedy k-means++ among samples whose distances are held. Compiled once per instruction set.
//
// With c_j the squared distance of sample j to the nearest seed so far, a candidate is the first place whose cumulative
// sum of c is above u sum_j c_j, and leaves sum_j min(D_ij, c_j). A cumulative sum waits for each of its additions, so
// it is formed of sums of blocks, and number by number in the one block that is drawn from.
#include "../seeds.h"
#include "blocks.h"

namespace oodkern::OODKERN_ISA {
namespace {

constexpr int64_t kDrawn = 32;  // numbers of such a block

template <class Real>
OODKERN_INLINE Real lesser(Real a, Real b) {
  return a < b ? a : b;
}

OODKERN_INLINE double number(const SeedCall& call, int64_t i) {
  return call.wide_uniform ? static_cast<const double*>(call.uniform)[i] : static_cast<const float*>(call.uniform)[i];
}

// floor(u N), as rounded in the dtype of u; of any u a sample.
OODKERN_INLINE int64_t first_seed(const SeedCall& call, int64_t i) {
  const double u = number(call, i);
  const double place = call.wide_uniform ? u * double(call.N) : float(u) * float(call.N);
  return place >= 1 ? place < double(call.N) ? int64_t(place) : call.N - 1 : 0;
}

template <class Real>
class Restart {
 public:
  explicit Restart(const SeedCall& call)
      : call_(call), blocks_((call.N + kDrawn - 1) / kDrawn), closest_(call.N), reach_(blocks_) {}

  void run(int64_t restart) {
    int64_t* seeds = call_.seeds + restart * call_.k;
    seeds[0] = first_seed(call_, restart * call_.candidates);
    for (int64_t j = 0; j < call_.N; ++j) closest_.data[j] = row(seeds[0])[j];
    for (int64_t step = 1; step < call_.k; ++step) {
      take(seeds[step - 1]);
      seeds[step] = best((step * call_.restarts + restart) * call_.candidates);
    }
  }

 private:
  OODKERN_INLINE const Real* row(int64_t sample) const {
    return static_cast<const Real*>(call_.distance) + sample * call_.stride;
  }

  // Distances to the nearest seed, now that there is this one, and what they add up to by the end of each block.
  OODKERN_INLINE void take(int64_t seed) {
    const Real* distance = row(seed);
    double total = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t first = block * kDrawn, size = lesser(call_.N - first, kDrawn);
      Real* closest = closest_.data + first;
      Real sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < size; ++j) {
        closest[j] = lesser(distance[first + j], closest[j]);
        sum += closest[j];
      }
      reach_.data[block] = total += double(sum);
    }
  }

  // The last sample where nothing is above, as where all distances are 0.
  OODKERN_INLINE int64_t drawn(double u) const {
    const double point = reach_.data[blocks_ - 1] * u;
    int64_t block = 0;
    while (block < blocks_ && !(reach_.data[block] > point)) ++block;
    if (block == blocks_) return call_.N - 1;
    const int64_t end = lesser(call_.N, (block + 1) * kDrawn);
    double sum = block > 0 ? reach_.data[block - 1] : 0.0;
    int64_t last = block * kDrawn;  // that can be drawn: sums in another order may round to no more than the point
    for (int64_t j = last; j < end; ++j) {
      sum += double(closest_.data[j]);
      if (sum > point) return j;
      if (closest_.data[j] > 0) last = j;
    }
    return last;
  }

  OODKERN_INLINE double left(int64_t candidate) const {
    const Real* distance = row(candidate);
    double total = 0;
    for (int64_t first = 0; first < call_.N; first += kBlock) {
      const int64_t size = lesser(call_.N - first, kBlock);
      const Real* closest = closest_.data + first;
      Real sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < size; ++j) sum += lesser(distance[first + j], closest[j]);
      total += double(sum);
    }
    return total;
  }

  // Of the candidates that the numbers from `first` on draw, the first that leaves least.
  OODKERN_INLINE int64_t best(int64_t first) const {
    int64_t seed = drawn(number(call_, first));
    double least = left(seed);
    for (int64_t i = 1; i < call_.candidates; ++i) {
      const int64_t candidate = drawn(number(call_, first + i));
      const double rest = left(candidate);
      if (!(rest < least)) continue;
      least = rest;
      seed = candidate;
    }
    return seed;
  }

  const SeedCall& call_;
  int64_t blocks_;
  Scratch<Real> closest_;  // [N]
  Scratch<double> reach_;  // [blocks]
};

template <class Real>
void run(const SeedCall& call, int64_t begin, int64_t end) {
  Restart<Real> one(call);
  for (int64_t restart = begin; restart < end; ++restart) one.run(restart);
}

}  // namespace

void run_seeds(const SeedCall& call, int64_t begin, int64_t end) {
  call.wide ? run<double>(call, begin, end) : run<float>(call, begin, end);
}

}  // namespace oodkern::OODKERN_ISA
