// What the work on tiles is written with: rows, and the types and the reducer of a call.
#pragma once

#include "../tiles.h"

#include "blocks.h"

namespace oodkern::OODKERN_ISA {
template <class Real>
OODKERN_INLINE Real* row_of(const Tile& tile, int64_t row) {
  return static_cast<Real*>(tile.z) + row * tile.stride;
}
template <class Real>
OODKERN_INLINE const Real* reals(const void* data) {
  return static_cast<const Real*>(data);
}
OODKERN_INLINE int64_t block_size(int64_t count, int64_t at) {
  return count - at < kBlock ? count - at : kBlock;
}

// Calls body(Math, Real) for the precision and body's reducer for the reduction.
template <class Body>
OODKERN_INLINE void with_math(bool wide, Body&& body) {
  wide ? body(Double{}) : body(Float{});
}
template <class Body>
OODKERN_INLINE void with_reducer(bool wide, Reduce reduce, Body&& body) {
  with_math(wide, [&](auto math) {
    using Math = decltype(math);
    switch (reduce.reduction) {
      case Reduction::kLogSumExp: return body(math, LogSumExp<Math>{reduce.temperature});
      case Reduction::kSoftplusSum: return body(math, SoftplusSum<Math>{0.0});
      case Reduction::kAbsSum: return body(math, AbsSum<Math>{0.0});
      case Reduction::kNorm: return;  // of no product
    }
  });
}
template <class Body>
OODKERN_INLINE void with_storage(Storage storage, Body&& body) {
  switch (storage) {
    case Storage::kFloat64: return body(double{}, double{});
    case Storage::kFloat32: return body(float{}, float{});
    case Storage::kBFloat16: return body(BFloat16{}, float{});
    case Storage::kFloat16: return body(Float16{}, float{});
  }
}

template <class Reducer>
OODKERN_INLINE RowState merged(const Reducer& reducer, RowState a, typename Reducer::State b) {
  using State = typename Reducer::State;
  using Real = typename Reducer::Real;
  const State sum = reducer.merge(State{Real(a.maximum), a.sum}, b);
  return {double(sum.maximum), sum.sum};
}

// The place of a row's largest element. The first NaN is the largest, as it is for torch.argmax.
template <class Math>
OODKERN_INLINE void best_of_row(Math, const Tile& tile, int64_t row, int64_t first_column, Best* best) {
  using Real = typename Math::Real;
  using Arg = ArgMax<Real>;
  const Real* z = row_of<Real>(tile, row);
  auto state = typename Arg::State{Real(best->maximum), best->index};
  for (int64_t at = 0; at < tile.columns; at += kBlock) {
    const int64_t size = block_size(tile.columns, at);
    Real maximum = -Math::infinity();
    int unordered = 0;
#pragma omp simd reduction(max : maximum) reduction(| : unordered)
    for (int64_t k = 0; k < size; ++k) {
      maximum = Arg::pivot(z[at + k], maximum);
      unordered |= z[at + k] != z[at + k];
    }
    if (state.maximum != state.maximum) break;
    if (!unordered && state.index >= 0 && !(maximum > state.maximum)) continue;
    int64_t k = 0;
    while (unordered ? z[at + k] == z[at + k] : z[at + k] != maximum) ++k;
    if (unordered) {
      state = {z[at + k], first_column + at + k};
      break;
    }
    state = Arg::merge(state, {maximum, first_column + at + k});
  }
  *best = {double(state.maximum), state.index};
}

// Columns are added up along the rows of a block of both: in Real within, in double from block to block.
constexpr int64_t kRowsOfBlock = 64;

// In tiles.cpp.
void reduce(const Tile& tile, Reduce how, RowState* state);
void best(const Tile& tile, int64_t first_column, Best* best);
// In scores.cpp.
void scores(const Tile& tile, int64_t first_column, RowState* lse, RowState* softplus, Best* best);
// In contrast.cpp.
void reduce_columns(const Tile& tile, RowState* state);
void positives(const Tile& tile, const Positives& which, bool by_column, double* sum);
void contrast(const Tile& tile, const Contrast& contrast, double* product);

}  // namespace oodkern::OODKERN_ISA
