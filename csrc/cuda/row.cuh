// The row engine on a GPU: rows are reduced, differentiated or differentiated twice, each pass reading its input once.
//
//   K <= 1,024   (float64: 128) warp_rows: a row in the registers of 8 or 32 lanes, all of a pass in one launch
//   longer       reduce_rows: one block a row, or several where rows are few (their states are merged by finish_rows);
//                map_rows: the gradient of a part of a row a block
//
// Everything is added up in an order that is fixed by the shapes, the alignment and the number of multiprocessors.
#pragma once

#include "row_view.cuh"

namespace oodkern::device {

constexpr int kUnroll = 4;  // accesses of 16 bytes that a thread has in flight

// The largest pivot, or the sum, over groups of kLanes lanes; every lane gets it.
template <class Reducer, int kLanes>
__device__ __forceinline__ typename Reducer::Real largest(typename Reducer::Real pivot) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) pivot = Reducer::pivot(__shfl_xor_sync(kAll, pivot, bits), pivot);
  return pivot;
}
template <int kLanes, class Real>
__device__ __forceinline__ Real total(Real sum) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
  return sum;
}

template <class Reducer, class Stored, Pass kPass, int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) warp_rows(const RowCall call, const Reducer reducer, int64_t rows) {
  using Real = typename Reducer::Real;
  constexpr int kWidth = Vector<Stored>::kWidth;
  constexpr int kRows = 32 / kLanes;  // of a warp
  const int lane = int(threadIdx.x) % 32;
  const int64_t step = int64_t(gridDim.x) * kWarps * kRows;
  int64_t first = (int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32) * kRows;
  for (; first < rows; first += step) {
    // Lanes behind the last row take part in the shuffles, with a row of nothing.
    const bool real = first + lane / kLanes < rows;
    const int64_t row = real ? first + lane / kLanes : rows - 1;
    const int columns = real ? int(call.columns) : 0;
    const bool leader = real && lane % kLanes == 0;
    const auto view = RowView<Stored, Real>::template of<kPass>(call, row);
    const int begin = lane % kLanes * kWidth - view.past;

    Real z[kVectors][kWidth];
    load_vectors(view.z, begin, kLanes * kWidth, columns, Reducer::absent(), z);
    if constexpr (kPass == Pass::kForward) {
      Real pivot = Reducer::init().maximum;
      if constexpr (Reducer::kPivot) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) pivot = Reducer::pivot(z[j][i], pivot);
        }
        pivot = largest<Reducer, kLanes>(pivot);
      }
      Real sum = 0;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += reducer.add(z[j][i], pivot);
      }
      sum = total<kLanes>(sum);
      if (leader) static_cast<Real*>(call.score)[row] = Real(call.sign) * reducer.value({pivot, sum});
    }
    if constexpr (kPass == Pass::kBackward) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[j][i] = view.scale * reducer.slope(z[j][i], view.value);
        store_elements(view.grad, begin + j * kLanes * kWidth, columns, view.grad_alike, z[j]);
      }
    }
    if constexpr (kPass == Pass::kDoubleBackward) {
      Real t[kVectors][kWidth];
      Real u = 0;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        load_elements(view.t, begin + j * kLanes * kWidth, columns, view.t_alike, Real(0), t[j]);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) u += t[j][i] * reducer.slope(z[j][i], view.value);
      }
      u = total<kLanes>(u);
      if (leader) static_cast<Real*>(call.grad_grad_score)[row] = Real(call.sign) * u;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[j][i] = view.scale * reducer.curvature(z[j][i], view.value, t[j][i], u);
        store_elements(view.grad, begin + j * kLanes * kWidth, columns, view.grad_alike, z[j]);
      }
    }
  }
}

// Long rows. The double backward's u = sum_k t_k slope_k is a reduction too, of states without a pivot.
template <Pass kPass, class Reducer>
__device__ __forceinline__ typename Reducer::State start_of() {
  if constexpr (kPass == Pass::kForward) return Reducer::init();
  return {0, 0};
}
template <Pass kPass, class Reducer>
__device__ __forceinline__ typename Reducer::State merged(const Reducer& reducer, typename Reducer::State a,
                                                          typename Reducer::State b) {
  if constexpr (kPass == Pass::kForward) return reducer.merge(a, b);
  return {0, a.sum + b.sum};
}
template <Pass kPass, class Reducer>
__device__ __forceinline__ typename Reducer::State merged_over_warp(const Reducer& reducer,
                                                                    typename Reducer::State state) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    state = merged<kPass>(reducer, state,
                          {__shfl_xor_sync(kAll, state.maximum, bits), __shfl_xor_sync(kAll, state.sum, bits)});
  }
  return state;
}
template <Pass kPass, class Reducer>
__device__ __forceinline__ void finish(const RowCall& call, const Reducer& reducer, int64_t row,
                                       typename Reducer::State state) {
  using Real = typename Reducer::Real;
  if constexpr (kPass == Pass::kForward) static_cast<Real*>(call.score)[row] = Real(call.sign) * reducer.value(state);
  if constexpr (kPass == Pass::kDoubleBackward) {
    static_cast<Real*>(call.grad_grad_score)[row] = Real(call.sign) * state.sum;
  }
}

// Each row by `splits` blocks; where they are several, partials [rows, splits] holds what each came to.
template <class Reducer, class Stored, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2) reduce_rows(const RowCall call, const Reducer reducer, int64_t rows,
                                                           int64_t splits, typename Reducer::State* partials) {
  using Real = typename Reducer::Real;
  using State = typename Reducer::State;
  constexpr int kWidth = Vector<Stored>::kWidth;
  // More would spill, with cotangents beside them.
  constexpr int kInFlight = kPass == Pass::kForward ? kUnroll : sizeof(Stored) == 8 ? 1 : kUnroll / 2;
  OODKERN_SHARED(State, of_warps, kWarps);
  const int thread = int(threadIdx.x);
  for (int64_t item = blockIdx.x; item < rows * splits; item += gridDim.x) {
    const int64_t row = item / splits, split = item % splits;
    const auto view = RowView<Stored, Real>::template of<kPass>(call, row);
    const int64_t vectors = (call.columns + view.past + kWidth - 1) / kWidth;
    const int64_t share = (vectors + splits - 1) / splits;
    const int64_t end = split * share + share < vectors ? split * share + share : vectors;
    const int64_t stop = end < vectors ? end * kWidth - view.past : call.columns;
    State state = start_of<kPass, Reducer>();
    for (int64_t at = split * share + thread; at < end; at += kThreads * kInFlight) {
      Real z[kInFlight][kWidth];
      load_vectors(view.z, at * kWidth - view.past, int64_t(kThreads * kWidth), stop, Reducer::absent(), z);
      Real pivot = 0, sum = 0;
      if constexpr (kPass == Pass::kForward) {
        pivot = Reducer::init().maximum;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) pivot = Reducer::pivot(z[j][i], pivot);
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum += reducer.add(z[j][i], pivot);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          Real t[kWidth];
          const int64_t vector = at + j * kThreads;
          load_elements(view.t, vector * kWidth - view.past, vector < end ? call.columns : 0, view.t_alike, Real(0), t);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum += t[i] * reducer.slope(z[j][i], view.value);
        }
      }
      state = merged<kPass>(reducer, state, {pivot, sum});
    }
    state = merged_over_warp<kPass>(reducer, state);
    if (thread % 32 == 0) of_warps.store(thread / 32, state);
    __syncthreads();
    if (thread == 0) {
      for (int warp = 1; warp < kWarps; ++warp) state = merged<kPass>(reducer, state, of_warps.load(warp));
      if (splits == 1) {
        finish<kPass>(call, reducer, row, state);
      } else {
        partials[item] = state;
      }
    }
    __syncthreads();  // before the next row's states are written over these
  }
}

// The states of a row's splits, by a warp: lane i takes i, i + 32, ...
template <class Reducer, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2) finish_rows(const RowCall call, const Reducer reducer, int64_t rows,
                                                           int64_t splits, const typename Reducer::State* partials) {
  const int lane = int(threadIdx.x) % 32;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32; row < rows;
       row += int64_t(gridDim.x) * kWarps) {
    typename Reducer::State state = start_of<kPass, Reducer>();
    for (int64_t i = lane; i < splits; i += 32) state = merged<kPass>(reducer, state, partials[row * splits + i]);
    state = merged_over_warp<kPass>(reducer, state);
    if (lane == 0) finish<kPass>(call, reducer, row, state);
  }
}

// Gradients of parts of rows: `parts` of kThreads * kUnroll vectors a row.
template <class Reducer, class Stored, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2)
    map_rows(const RowCall call, const Reducer reducer, int64_t rows, int64_t parts) {
  using Real = typename Reducer::Real;
  constexpr int kWidth = Vector<Stored>::kWidth;
  for (int64_t item = blockIdx.x; item < rows * parts; item += gridDim.x) {
    const int64_t row = item / parts, part = item % parts;
    const auto view = RowView<Stored, Real>::template of<kPass>(call, row);
    Real u = 0;
    if constexpr (kPass == Pass::kDoubleBackward) {
      u = Real(call.sign) * static_cast<const Real*>(call.grad_grad_score)[row];
    }
    const int64_t begin = (part * kUnroll * kThreads + int(threadIdx.x)) * kWidth - view.past;
    Real z[kUnroll][kWidth];
    load_vectors(view.z, begin, int64_t(kThreads * kWidth), call.columns, Reducer::absent(), z);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t at = begin + j * kThreads * kWidth;
      if constexpr (kPass == Pass::kBackward) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[j][i] = view.scale * reducer.slope(z[j][i], view.value);
      } else {
        Real t[kWidth];
        load_elements(view.t, at, call.columns, view.t_alike, Real(0), t);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[j][i] = view.scale * reducer.curvature(z[j][i], view.value, t[i], u);
      }
      store_elements(view.grad, at, call.columns, view.grad_alike, z[j]);
    }
  }
}

}  // namespace oodkern::device
