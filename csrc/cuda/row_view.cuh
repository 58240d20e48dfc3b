// How kernels of the row engine see a row: in vectors of 16 bytes from a multiple of 16 on, whatever its address.
#pragma once

#include "../cpu/rows.h"
#include "device.cuh"

namespace oodkern::device {

// How many elements `row` lies behind a multiple of 16 bytes. Rows are read in vectors from that multiple on; the first
// and last may stick out of the row, and are then read one element after another.
template <class Stored>
__device__ __forceinline__ int elements_past_boundary(const Stored* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Stored));
}

// Elements [at, at + kWidth) of a row of `columns`; `outside` for those that it has not.
template <class Index, class Stored, class Real, int kWidth>
__device__ __forceinline__ void load_elements(const Stored* row, Index at, Index columns, bool aligned, Real outside,
                                              Real (&out)[kWidth]) {
  if (aligned && at >= 0 && at + kWidth <= columns) {
    const Vector<Stored> vector = load_vector(row + at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = widen(vector.elements[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = at + i >= 0 && at + i < columns ? widen(row[at + i]) : outside;
}

// The same for elements [at + j * step, at + j * step + kWidth) of each j < kVectors, of a row whose multiples of 16
// bytes `at` and `step` name. All whole vectors are asked for before an edge is looked at and before anything is
// widened: with a branch a vector, nvcc 13.0 widens 16 bits inside of it, and so waits for each before it asks for the
// next.
template <class Index, class Stored, class Real, int kVectors, int kWidth>
__device__ __forceinline__ void load_vectors(const Stored* row, Index at, Index step, Index columns, Real outside,
                                             Real (&out)[kVectors][kWidth]) {
  Vector<Stored> vectors[kVectors];
  Stored nothing;
  narrow(outside, &nothing);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const Index from = at + j * step;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) vectors[j].elements[i] = nothing;
    if (from >= 0 && from + kWidth <= columns) vectors[j] = load_vector(row + from);
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const Index from = at + j * step;
    if ((from < 0 && from + kWidth > 0) || (from < columns && from + kWidth > columns)) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (from + i >= 0 && from + i < columns) vectors[j].elements[i] = row[from + i];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[j][i] = widen(vectors[j].elements[i]);
  }
}

template <class Index, class Stored, class Real, int kWidth>
__device__ __forceinline__ void store_elements(Stored* row, Index at, Index columns, bool aligned,
                                               const Real (&values)[kWidth]) {
  if (aligned && at >= 0 && at + kWidth <= columns) {
    Vector<Stored> vector;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) narrow(values[i], &vector.elements[i]);
    store_vector(row + at, vector);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (at + i >= 0 && at + i < columns) narrow(values[i], row + at + i);
  }
}

// What a row's derivatives are made of.
template <class Stored, class Real>
struct RowView {
  const Stored* z;
  const Stored* t;  // cotangent
  Stored* grad;
  int past;                  // elements_past_boundary(z)
  bool t_alike, grad_alike;  // whether they lie behind a multiple of 16 bytes as far as z does
  Real value;                // of the reduction
  Real scale;                // sign * grad_score

  template <Pass kPass>
  static __device__ __forceinline__ RowView of(const RowCall& call, int64_t row) {
    RowView view{};
    view.z = static_cast<const Stored*>(call.logits) + row * call.logits_stride;
    view.past = elements_past_boundary(view.z);
    if constexpr (kPass != Pass::kForward) {
      view.grad = static_cast<Stored*>(call.grad_logits) + row * call.columns;
      view.grad_alike = elements_past_boundary(view.grad) == view.past;
      const Real sign = Real(call.sign);
      view.value = sign * static_cast<const Real*>(call.saved_score)[row * call.saved_score_stride];
      view.scale = sign * static_cast<const Real*>(call.grad_score)[row * call.grad_score_stride];
    }
    if constexpr (kPass == Pass::kDoubleBackward) {
      view.t = static_cast<const Stored*>(call.cotangent) + row * call.cotangent_stride;
      view.t_alike = elements_past_boundary(view.t) == view.past;
    }
    return view;
  }
};

}  // namespace oodkern::device
