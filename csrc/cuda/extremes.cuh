// The extremes of clusters on a GPU. Where per_side is small, in as many rounds: each finds, of every cluster and on
// both sides, the best score that comes after the best of the round before. What is the best is the largest of
// integers, so the order in which atomics meet does not matter. A score that does not beat what a table holds costs a
// read of the table.
//
// While rounds go on the results hold words: 0 for no sample, else as packed_extremes or wide_extremes say.
//
// Where per_side is large, a sort of clusters and scores is less: the extremes lie at the beginnings of clusters.
#pragma once

#include "../select.h"
#include "select.cuh"

namespace oodkern::device {

constexpr int kScoresAtOnce = 4;  // that a thread has in flight
constexpr int kSides = 2;         // the lowest, the highest

struct Extremes {
  const int64_t* cluster;  // [N]
  int64_t N, clusters, per_side;
  uint64_t* sides[kSides];  // [clusters, per_side] each
  uint64_t* bests;          // [2, kSides, clusters]: of the rounds of even and of odd number, where wide
};

// Words become 0; where wide, those of the bests of `round`, else of both sides.
__global__ void __launch_bounds__(kThreads) clear_extremes(const Extremes call, int64_t round) {
  const int64_t step = int64_t(gridDim.x) * kThreads, start = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (call.bests) {
    for (int64_t i = start; i < kSides * call.clusters; i += step)
      call.bests[round % 2 * kSides * call.clusters + i] = 0;
  }
  if (round > 0) return;
  for (int64_t i = start; i < call.clusters * call.per_side; i += step) {
    call.sides[0][i] = 0;
    call.sides[1][i] = 0;
  }
}

// Calls take(i, score, cluster) for the scores that are scores and whose cluster there is.
template <class Real, class Take>
__device__ __forceinline__ void for_each_score(const Extremes& call, const Real* scores, Take take) {
  constexpr int64_t kPart = kThreads * kScoresAtOnce;
  for (int64_t first = blockIdx.x * kPart + threadIdx.x; first < call.N; first += gridDim.x * kPart) {
    Real score[kScoresAtOnce];
    int64_t cluster[kScoresAtOnce];
#pragma unroll
    for (int j = 0; j < kScoresAtOnce; ++j) {
      const int64_t i = first + j * kThreads;
      score[j] = i < call.N ? scores[i] : Real(NAN);
      cluster[j] = i < call.N ? call.cluster[i] : 0;
    }
#pragma unroll
    for (int j = 0; j < kScoresAtOnce; ++j) {
      if (score[j] != score[j] || cluster[j] < 0 || cluster[j] >= call.clusters) continue;
      take(first + j * kThreads, score[j], cluster[j]);
    }
  }
}

// A round of float32 scores, N < 2^32: a word is the score in its upper half, ~index in its lower. `kShared`: a block
// keeps words of its own, [kSides, clusters], and hands them on at its end.
template <bool kShared>
__global__ void __launch_bounds__(kThreads) packed_extremes(const Extremes call, const float* scores, int64_t round) {
  OODKERN_DYNAMIC_SHARED(uint64_t, own);
  const int clusters = int(call.clusters);
  if constexpr (kShared) {
    for (int i = threadIdx.x; i < kSides * clusters; i += kThreads) own.store(i, 0);
    __syncthreads();
  }
  for_each_score(call, scores, [&](int64_t i, float score, int64_t cluster) {
    const uint32_t key = ordered(score);
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      const uint64_t word = uint64_t(side ? key : ~key) << 32 | uint32_t(~i);
      uint64_t* best = call.sides[side] + cluster * call.per_side + round;
      if (round > 0 && word >= best[-1]) continue;
      if constexpr (kShared) {
        const int place = side * clusters + int(cluster);
        if (word > relaxed(own, place)) atomic_largest(own, place, word);
      } else {
        if (word > relaxed(best)) atomic_largest(best, word);
      }
    }
  });
  if constexpr (kShared) {
    __syncthreads();
    for (int i = threadIdx.x; i < kSides * clusters; i += kThreads) {
      uint64_t* best =
          i < clusters ? call.sides[0] + i * call.per_side : call.sides[1] + (i - clusters) * call.per_side;
      best += round;
      const uint64_t word = own.load(i);
      if (word > relaxed(best)) atomic_largest(best, word);
    }
  }
}

// The same where a score and an index do not fit into one word: with `kIndex` false the round's best score goes to
// bests, then with true the lowest index that has it, as ~index.
template <class Real, bool kIndex>
__global__ void __launch_bounds__(kThreads) wide_extremes(const Extremes call, const Real* scores, int64_t round) {
  uint64_t* bests = call.bests + round % 2 * kSides * call.clusters;
  const uint64_t* before = call.bests + (round + 1) % 2 * kSides * call.clusters;
  for_each_score(call, scores, [&](int64_t i, Real score, int64_t cluster) {
    const OrderedBits<Real> bits = ordered(score);
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      const uint64_t key = side ? bits : OrderedBits<Real>(~bits);
      uint64_t* best = call.sides[side] + cluster * call.per_side + round;
      const int64_t place = side * call.clusters + cluster;
      if (round > 0) {
        const bool follows = key < before[place] || (key == before[place] && ~uint64_t(i) < best[-1]);
        if (best[-1] == 0 || !follows) continue;
      }
      if constexpr (kIndex) {
        if (key == bests[place] && ~uint64_t(i) > relaxed(best)) atomic_largest(best, ~uint64_t(i));
      } else {
        if (key > relaxed(bests + place)) atomic_largest(bests + place, key);
      }
    }
  });
}

// Words become indices, 0 becomes -1.
__global__ void __launch_bounds__(kThreads) finish_extremes(const Extremes call) {
  const int64_t step = int64_t(gridDim.x) * kThreads, count = call.clusters * call.per_side;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      const uint64_t word = call.sides[side][i];
      const uint64_t index = call.bests ? ~word : uint64_t(uint32_t(~word));
      call.sides[side][i] = word == 0 ? ~uint64_t(0) : index;
    }
  }
}

constexpr uint64_t kNoCluster = INT64_MAX;  // of a NaN, and of a cluster that there is not

// Words [N] to sort as int64: the cluster, below 2^31 - 1, then the score, the best of the side first.
__global__ void __launch_bounds__(kThreads)
    words_to_sort(const Extremes call, const float* scores, uint64_t* words, int side) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < call.N; i += step) {
    const float score = scores[i];
    const int64_t cluster = call.cluster[i];
    const uint32_t key = ordered(score);
    const bool counts = score == score && cluster >= 0 && cluster < call.clusters;
    words[i] = counts ? uint64_t(cluster) << 32 | uint32_t(side ? ~key : key) : kNoCluster;
  }
}

// What of the sorted words [N] is among the first per_side of a cluster; `order` [N] is where words came from.
__global__ void __launch_bounds__(kThreads)
    take_sorted(const Extremes call, const uint64_t* words, const int64_t* order, int64_t* side) {
  const int64_t step = int64_t(gridDim.x) * kThreads, count = call.clusters * call.per_side;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const uint64_t cluster = uint64_t(i / call.per_side);
    int64_t first = 0, last = call.N;  // the cluster's words begin between them
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (words[middle] >> 32 < cluster) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    const int64_t place = first + i % call.per_side;
    side[i] = place < call.N && words[place] >> 32 == cluster ? order[place] : -1;
  }
}

}  // namespace oodkern::device
