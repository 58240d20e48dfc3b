// The training heads on a GPU: a row's loss and its slope from one read of its logits.
//
//   head_lanes    K <= 1,024 (float64: 128): a row in the registers of 8 or 32 lanes
//   head_blocks   longer: a block a row (where only slopes are asked for, a chunk of one). It holds the chunk that it
//                 read last, 8,192 columns (float64: 4,096); what a longer row has before that it reads again, last
//                 first, while it is still in L2
//
// These are the heads of a softmax; binary_head.cuh has the other.
//
// Everything is added up in an order that is fixed by the shapes and the alignment.
#pragma once

#include "../cpu/heads.h"
#include "row.cuh"

namespace oodkern::device {

// Whether a row of a gradient that is mended is left as it is.
template <class Real>
__device__ __forceinline__ bool is_formed(const HeadCall& call, int64_t row) {
  return call.foreseen && is_foreseen(static_cast<const Real*>(call.grad_value)[row * call.grad_value_stride],
                                      static_cast<const Real*>(call.foreseen)[row * call.foreseen_stride]);
}

template <class Stored>
struct HeadRow {
  const Stored* z;
  Stored* grad;  // null where none is asked for
  int past;      // elements_past_boundary(z)
  bool alike;    // whether grad lies behind a multiple of 16 bytes as far as z does

  static __device__ __forceinline__ HeadRow of(const HeadCall& call, int64_t row) {
    HeadRow view{};
    view.z = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    view.past = elements_past_boundary(view.z);
    if (call.grad_logits) {
      view.grad = static_cast<Stored*>(call.grad_logits) + row * call.columns;
      view.alike = elements_past_boundary(view.grad) == view.past;
    }
    return view;
  }
};

// The gradient of a softmax head: factor e_k - shift with e_k = exp(z_k - maximum).
template <class Math>
struct HeadSlope {
  using Real = typename Math::Real;
  Real maximum, factor, shift;

  static __device__ __forceinline__ HeadSlope of(const HeadCall& call, int64_t row, Softmax<Math> softmax, Real scale) {
    if (!call.grad_logits) return {softmax.maximum, 0, 0};
    const Real upstream = static_cast<const Real*>(call.grad_value)[row * call.grad_value_stride];
    const Real shift = call.head == Head::kUniform ? upstream / Real(call.columns) : Real(0);
    return {softmax.maximum, upstream * scale * softmax.reciprocal, shift};
  }
  // From what the forward pass saved of the row.
  static __device__ __forceinline__ HeadSlope saved(const HeadCall& call, int64_t row) {
    const Real* rows = static_cast<const Real*>(call.rows) + 3 * row;
    return of(call, row, {rows[0], rows[1]}, rows[2]);
  }
  template <int kWidth>
  __device__ __forceinline__ void apply(Real (&e)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) e[i] = factor * e[i] - shift;
  }
};

// The loss of a row whose softmax has the state `state`, and whose maximum lies `above_mean` above the mean of its
// logits. A row of all -inf has E = +inf and slope 0; a NaN stays.
template <class Math>
__device__ __forceinline__ HeadSlope<Math> finish_head(const HeadCall& call, int64_t row,
                                                       typename LogSumExp<Math>::State state,
                                                       typename Math::Real above_mean, bool leader) {
  using Real = typename Math::Real;
  const auto softmax = Softmax<Math>::of(state);
  const bool none = state.sum == Real(0);
  const Real log_sum = none ? Real(0) : Math::log(state.sum);
  Real value = log_sum + above_mean, scale = 1;
  if (call.head != Head::kUniform) {
    const Real sign = call.head == Head::kEnergyIn ? Real(1) : Real(-1);
    const Real distance = none ? Math::infinity() : (-softmax.maximum - Real(call.margin)) - log_sum;  // E - margin
    const Real hinge = sign * distance < Real(0) ? Real(0) : sign * distance;
    value = hinge * hinge;
    scale = none ? Real(0) : Real(-2) * sign * hinge;
  }
  if (leader) {
    static_cast<Real*>(call.value)[row] = value;
    Real* rows = static_cast<Real*>(call.rows) + 3 * row;
    rows[0] = softmax.maximum, rows[1] = softmax.reciprocal, rows[2] = scale;
  }
  return HeadSlope<Math>::of(call, row, softmax, scale);
}

// The sum of z - reference over those of the elements [at, at + kWidth) that a row of `columns` has.
template <class Index, class Real, int kWidth>
__device__ __forceinline__ Real sum_about(Real reference, const Real (&z)[kWidth], Index at, Index columns) {
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += at + i >= 0 && at + i < columns ? z[i] - reference : Real(0);
  return sum;
}

template <class Math, class Stored, int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads, 3) head_lanes(const HeadCall call, int64_t rows) {
  using Real = typename Math::Real;
  using Reducer = LogSumExp<Math>;
  constexpr int kWidth = Vector<Stored>::kWidth;
  constexpr int kRows = 32 / kLanes;  // of a warp
  const Reducer reducer(1.0);
  const int lane = int(threadIdx.x) % 32;
  const int64_t step = int64_t(gridDim.x) * kWarps * kRows;
  int64_t first = (int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32) * kRows;
  for (; first < rows; first += step) {
    // Lanes behind the last row take part in the shuffles, with a row of nothing.
    const bool real = first + lane / kLanes < rows;
    const int64_t row = real ? first + lane / kLanes : rows - 1;
    const bool formed = is_formed<Real>(call, row);
    if (__all_sync(kAll, formed)) continue;
    const int columns = real && !formed ? int(call.columns) : 0;
    const auto view = HeadRow<Stored>::of(call, row);
    const int begin = lane % kLanes * kWidth - view.past;
    Real z[kVectors][kWidth];
    load_vectors(view.z, begin, kLanes * kWidth, columns, -Math::infinity(), z);
    Real pivot = Reducer::init().maximum, above_mean = 0;
    HeadSlope<Math> slope{};
    if (call.value) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) pivot = Reducer::pivot(z[j][i], pivot);
      }
      pivot = largest<Reducer, kLanes>(pivot);
      if (call.head == Head::kUniform) {
        Real linear = 0;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          linear += sum_about(Reducer::finite(pivot), z[j], begin + j * kLanes * kWidth, columns);
        }
        above_mean = -total<kLanes>(linear) / Real(call.columns < 1 ? 1 : call.columns);
      }
    } else {
      slope = HeadSlope<Math>::saved(call, row);
      pivot = slope.maximum;
    }
    Real sum = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        z[j][i] = reducer.add(z[j][i], pivot);
        sum += z[j][i];
      }
    }
    if (call.value) {
      sum = total<kLanes>(sum);
      slope = finish_head<Math>(call, row, {pivot, sum}, above_mean, real && lane % kLanes == 0);
    }
    if (!call.grad_logits) continue;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      slope.apply(z[j]);
      store_elements(view.grad, begin + j * kLanes * kWidth, columns, view.alike, z[j]);
    }
  }
}

// exp(z - pivot) in the place of z; their sum.
template <class Reducer, class Real, int kVectors, int kWidth>
__device__ __forceinline__ Real exponentials(const Reducer& reducer, Real pivot, Real (&z)[kVectors][kWidth]) {
  Real sum = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      z[j][i] = reducer.add(z[j][i], pivot);
      sum += z[j][i];
    }
  }
  return sum;
}
template <class Math, class Stored, int kVectors, int kWidth>
__device__ __forceinline__ void store_chunk(const HeadRow<Stored>& view, int64_t at, int64_t columns,
                                            const HeadSlope<Math>& slope, typename Math::Real (&e)[kVectors][kWidth]) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    slope.apply(e[j]);
    store_elements(view.grad, at + j * kThreads * kWidth, columns, view.alike, e[j]);
  }
}

template <class Math, class Stored, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) head_blocks(const HeadCall call, int64_t rows, int64_t chunks) {
  using Real = typename Math::Real;
  using Reducer = LogSumExp<Math>;
  constexpr int kWidth = Vector<Stored>::kWidth;
  constexpr int64_t kStep = kThreads * kWidth, kChunk = kStep * kVectors;
  OODKERN_SHARED(Real, pivots, 2 * kWarps);  // of this chunk, and of the one before
  OODKERN_SHARED(Real, sums, 2 * kWarps);
  const Reducer reducer(1.0);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t parts = call.value ? 1 : chunks;
  int turn = 0;
  for (int64_t item = blockIdx.x; item < rows * parts; item += gridDim.x) {
    const int64_t row = item / parts;
    const auto view = HeadRow<Stored>::of(call, row);
    const int64_t begin = int64_t(threadIdx.x) * kWidth - view.past;
    Real z[kVectors][kWidth];
    if (!call.value) {
      if (is_formed<Real>(call, row)) continue;
      const int64_t at = begin + item % parts * kChunk;
      load_vectors(view.z, at, kStep, call.columns, -Math::infinity(), z);
      const auto slope = HeadSlope<Math>::saved(call, row);
      exponentials(reducer, slope.maximum, z);
      store_chunk(view, at, call.columns, slope, z);
      continue;
    }
    auto state = Reducer::init();  // of the elements of this thread, about the largest of the block
    Real linear = 0, reference = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t at = begin + chunk * kChunk;
      load_vectors(view.z, at, kStep, call.columns, -Math::infinity(), z);
      Real pivot = state.maximum;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) pivot = Reducer::pivot(z[j][i], pivot);
      }
      pivot = largest<Reducer, 32>(pivot);
      if (lane == 0) pivots.store(turn * kWarps + warp, pivot);
      __syncthreads();
      for (int i = 0; i < kWarps; ++i) pivot = Reducer::pivot(pivots.load(turn * kWarps + i), pivot);
      turn ^= 1;
      if (call.head == Head::kUniform) {
        // About the largest of the first chunk: a maximum is never below the mean by more than a chunk's share of that.
        if (chunk == 0) reference = Reducer::finite(pivot);
        Real part = 0;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          part += sum_about(reference, z[j], at + j * kThreads * kWidth, call.columns);
        }
        linear += part;
      }
      state = reducer.merge(state, {pivot, exponentials(reducer, pivot, z)});
    }
    const Real sum_of_warp = total<32>(state.sum), linear_of_warp = total<32>(linear);
    if (lane == 0) {
      sums.store(warp, sum_of_warp);
      sums.store(kWarps + warp, linear_of_warp);
    }
    __syncthreads();
    state.sum = linear = 0;
    for (int i = 0; i < kWarps; ++i) {
      state.sum += sums.load(i);
      linear += sums.load(kWarps + i);
    }
    const Real above_mean = (Reducer::finite(state.maximum) - reference) - linear / Real(call.columns);
    const auto slope = finish_head<Math>(call, row, state, above_mean, threadIdx.x == 0);
    if (!call.grad_logits) continue;
    store_chunk(view, begin + (chunks - 1) * kChunk, call.columns, slope, z);
    for (int64_t chunk = chunks - 2; chunk >= 0; --chunk) {
      const int64_t at = begin + chunk * kChunk;
      load_vectors(view.z, at, kStep, call.columns, -Math::infinity(), z);
      exponentials(reducer, slope.maximum, z);
      store_chunk(view, at, call.columns, slope, z);
    }
  }
}

}  // namespace oodkern::device
