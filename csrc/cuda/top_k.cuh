// The k best of a stream on a GPU. Candidates that were held and scores that pass the bar, the k-th best so far, are
// laid together in a pool; what they come to is known to the device alone, and kernels that have nothing to do return.
// Where the pool is too full, or a bar can be set for the first time, it is cut to the k best by a radix selection:
// count_digits counts how often each value of one digit of 11 bits occurs among the candidates that agree with the
// k-th best in the digits above, score first, then index, and the next kernel reads off which of them it has.
//
// The set that is kept is exact. The order in which candidates lie is that of atomics, and means nothing.
#pragma once

#include "../select.h"
#include "row_view.cuh"
#include "select.cuh"

namespace oodkern::device {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kIndexDigits = (64 + kDigitBits - 1) / kDigitBits;
constexpr int kMostDigits = 2 * kIndexDigits;
template <class Real>
constexpr int kScoreDigits = (8 * int(sizeof(Real)) + kDigitBits - 1) / kDigitBits;

// What is known of the k-th best: its first `digits` digits, and that it is number `rank` of those that have them.
struct Pick {
  uint64_t score, index;  // the digits in their places, 0 below
  int64_t rank;
  int digits;
  bool alone;  // nothing else has these digits
};

struct Control {
  int64_t held;       // candidates before this update
  int64_t survivors;  // scores that passed the bar
  bool has_bar;
  int64_t placed, equal;    // by place_best
  Pick picks[kMostDigits];  // before each digit
  int64_t counts[kMostDigits][kDigits];
};

template <class Real>
struct Pool {
  Real* values;      // [capacity + scores of an update]
  int64_t* indices;  // likewise
  Control* control;
  int64_t k, capacity;
  Real sign;

  __device__ int64_t total() const { return control->held + control->survivors; }
  // Whether the candidates are to be cut to the k best: there is no room for them, or the first bar can be set.
  __device__ bool is_cut() const { return total() >= (control->has_bar ? capacity : k); }

  // Digit after digit of these two numbers: a large score, then a low index.
  __device__ uint64_t score_word(int64_t i) const { return ordered(sign * values[i]); }
  __device__ uint64_t index_word(int64_t i) const { return ~uint64_t(indices[i]); }
};

// Which word a digit is of, and how far it is from the word's end.
template <class Real>
struct Digit {
  bool of_score;
  int shift, bits;

  __device__ explicit Digit(int number) {
    of_score = number < kScoreDigits<Real>;
    const int above = kDigitBits * (of_score ? number : number - kScoreDigits<Real>);
    const int left = (of_score ? 8 * int(sizeof(Real)) : 64) - above;
    bits = left < kDigitBits ? left : kDigitBits;
    shift = left - bits;
  }
};

// Whether candidate i comes before (1), beside (0) or behind (-1) those that have the picked digits.
template <class Real>
__device__ __forceinline__ int compared(const Pool<Real>& pool, int64_t i, const Pick& pick) {
  if (pick.digits == 0) return 0;
  const Digit<Real> last(pick.digits - 1);
  uint64_t own = pool.score_word(i), picked = pick.score;
  if (!last.of_score) {
    if (own != picked) return own > picked ? 1 : -1;
    own = pool.index_word(i), picked = pick.index;
  }
  own = own >> last.shift, picked = picked >> last.shift;
  return own == picked ? 0 : own > picked ? 1 : -1;
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    start_update(const Pool<Real> pool, const int64_t* state) {  // state as top_k_update has it
  Control& control = *pool.control;
  const int64_t step = int64_t(gridDim.x) * kThreads, start = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  int64_t* counts = control.counts[0];
  for (int64_t i = start; i < kMostDigits * kDigits; i += step) counts[i] = 0;
  if (start > 0) return;
  const int64_t held = state[0];
  control.held = held < 0 ? 0 : held < pool.capacity ? held : pool.capacity;
  control.has_bar = state[1] != 0 && held >= pool.k;
  control.survivors = control.placed = control.equal = 0;
  control.picks[0] = {0, 0, pool.k, 0, false};
}

template <class T>
__device__ __forceinline__ T sum_to_lane(T x) {  // over this lane and those below
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_sync(kAll, x, lane >= distance ? lane - distance : lane);
    if (lane >= distance) x += other;
  }
  return x;
}

// The first of `wanted` places that are this thread's alone, `counter` counting those that are taken. One atomic
// operation a warp: all its lanes call.
__device__ __forceinline__ int64_t taken_places(int64_t* counter, int wanted) {
  const int lane = int(threadIdx.x) % 32, end = sum_to_lane(wanted);
  int64_t first = 0;
  if (lane == 31 && end > 0) first = int64_t(atomic_sum(as_unsigned(counter), uint64_t(end)));
  return __shfl_sync(kAll, first, 31) + end - wanted;
}

template <int kWidth>
__device__ __forceinline__ int within(int64_t x) {
  return x < 0 ? 0 : x < kWidth ? int(x) : kWidth;
}

// Scores [count] of samples offset, offset + 1, ...: those that pass the bar go to the pool, behind what was held.
template <class Stored, class Real>
__global__ void __launch_bounds__(kThreads)
    sift(const Pool<Real> pool, const Stored* scores, int64_t count, int64_t offset, const Real* values,
         const int64_t* indices, int64_t* state) {
  constexpr int kWidth = Vector<Stored>::kWidth;
  constexpr int kVectors = kWidth == 8 ? 1 : 2;  // in flight; two of eight scores take 72 registers
  Control& control = *pool.control;
  const int64_t held = control.held, step = int64_t(gridDim.x) * kThreads;
  const int64_t start = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = start; i < held; i += step) {
    pool.values[i] = values[i];
    pool.indices[i] = indices[i];
  }
  // Without a bar everything passes that is no NaN.
  const bool has_bar = control.has_bar;
  const Real bar = has_bar ? pool.sign * values[pool.k - 1] : -Real(INFINITY);
  const int64_t bar_index = has_bar ? indices[pool.k - 1] : 0;
  const int past = elements_past_boundary(scores), lane = int(threadIdx.x) % 32;
  int nans = 0;
  // All lanes of a warp go through the loop together.
  const int64_t stride = step * kWidth;
  for (int64_t first = (start - lane) * kWidth - past; first < count; first += kVectors * stride) {
    const int64_t at = first + lane * kWidth;
    Real score[kVectors][kWidth];
    unsigned passed = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      load_elements(scores, at + j * stride, count, true, Real(0), score[j]);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int64_t place = at + j * stride;
      const int begin = within<kWidth>(-place), end = within<kWidth>(count - place);
      const int ties = has_bar ? within<kWidth>(bar_index - offset - place) : kWidth;  // equals before it are better
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const bool there = i >= begin && i < end;
        const Real x = pool.sign * score[j][i];
        nans += there && x != x;
        const bool better = x > bar || (x == bar && i < ties);
        passed |= unsigned(there && better) << (j * kWidth + i);
      }
    }
    if (!__any_sync(kAll, passed != 0)) continue;
    int64_t place = held + taken_places(&control.survivors, __popc(passed));
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (!(passed >> (j * kWidth + i) & 1)) continue;
        pool.values[place] = score[j][i];
        pool.indices[place++] = offset + at + j * stride + i;
      }
    }
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) nans += __shfl_xor_sync(kAll, nans, bits);
  if (lane == 0 && nans) atomic_sum(as_unsigned(state + 2), uint64_t(nans));
}

// The pick before digit `number`, by what count_digits counted of the digit before. Every thread of a block gets it.
template <class Real>
__device__ __forceinline__ Pick picked_before(const Pool<Real>& pool, int number) {
  OODKERN_SHARED(Pick, found, 1);
  OODKERN_SHARED(int64_t, of_warps, kWarps);
  Pick pick = pool.control->picks[number > 0 ? number - 1 : 0];
  if (number == 0 || pick.alone) return pick;
  // Thread t has a stretch of the digit's values, the largest first.
  constexpr int kEach = kDigits / kThreads;
  const int thread = int(threadIdx.x), lane = thread % 32, highest = kDigits - 1 - thread * kEach;
  const int64_t* counts = pool.control->counts[number - 1];
  int64_t sum = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) sum += counts[highest - j];
  int64_t before = sum_to_lane(sum);  // the candidates of this and of better stretches
  if (lane == 31) of_warps.store(thread / 32, before);
  __syncthreads();
  for (int warp = 0; warp < thread / 32; ++warp) before += of_warps.load(warp);
  before -= sum;
  if (before < pick.rank && pick.rank <= before + sum) {
    int value = highest;
    for (; before + counts[value] < pick.rank; --value) before += counts[value];
    const Digit<Real> digit(number - 1);
    const uint64_t placed = uint64_t(value) << digit.shift;
    pick.score |= digit.of_score ? placed : 0;
    pick.index |= digit.of_score ? 0 : placed;
    pick.rank -= before;
    pick.digits = number;
    pick.alone = counts[value] == 1;
    found.store(0, pick);
  }
  __syncthreads();
  return found.load(0);
}

template <class Real>
__global__ void __launch_bounds__(kThreads) count_digits(const Pool<Real> pool, int number) {
  OODKERN_SHARED(unsigned, counts, kDigits);
  if (!pool.is_cut()) return;
  const Pick pick = picked_before(pool, number);
  if (number > 0 && blockIdx.x == 0 && threadIdx.x == 0) pool.control->picks[number] = pick;
  if (pick.alone) return;
  for (int i = threadIdx.x; i < kDigits; i += kThreads) counts.store(i, 0);
  __syncthreads();
  const Digit<Real> digit(number);
  const int64_t total = pool.total(), step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    if (compared(pool, i, pick) != 0) continue;
    const uint64_t word = digit.of_score ? pool.score_word(i) : pool.index_word(i);
    atomic_sum(counts, int(word >> digit.shift & ((1u << digit.bits) - 1)), 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kDigits; i += kThreads) {
    const unsigned count = counts.load(i);
    if (count) atomic_sum(as_unsigned(pool.control->counts[number] + i), uint64_t(count));
  }
}

// The pool's candidates, or the k best of them, go where they are held from one update to the next.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    place_best(const Pool<Real> pool, Real* values, int64_t* indices, int64_t* state) {
  Control& control = *pool.control;
  const bool cut = pool.is_cut();
  const int64_t total = pool.total(), step = int64_t(gridDim.x) * kThreads;
  const Pick pick = cut ? picked_before(pool, kScoreDigits<Real> + kIndexDigits) : Pick{};
  const int64_t start = int64_t(blockIdx.x) * kThreads + threadIdx.x, lane = threadIdx.x % 32;
  if (start == 0) {
    state[0] = cut ? pool.k : total;
    state[1] = cut || control.has_bar;
  }
  // All lanes of a warp go through the loop together.
  for (int64_t i = start + (cut ? 0 : control.held); i - lane < total; i += step) {
    int64_t place = i;
    if (cut) {
      const int side = i < total ? compared(pool, i, pick) : -1;
      const int64_t better = taken_places(&control.placed, side > 0), equal = taken_places(&control.equal, side == 0);
      // The last place is the k-th best's. Should one sample have been given twice, several are equal to it.
      place = side > 0 ? better : side == 0 ? pool.k - pick.rank + equal : pool.k;
    }
    if (place >= (cut ? pool.k : total)) continue;
    values[place] = pool.values[i];
    indices[place] = pool.indices[i];
  }
}

}  // namespace oodkern::device
