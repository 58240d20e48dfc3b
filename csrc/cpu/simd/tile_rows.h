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

// Columns are added up along the rows of a block of both: in Real within, in double from block to block.
constexpr int64_t kRowsOfBlock = 64;

// In contrast.cpp.
void reduce_columns(const Tile& tile, RowState* state);
void positives(const Tile& tile, const Positives& which, bool by_column, double* sum);
void contrast(const Tile& tile, const Contrast& contrast, double* product);

}  // namespace oodkern::OODKERN_ISA
