// The binary head on a GPU: each logit is read once beside its label, and what it adds to the loss and its slope are
// known at once.
#pragma once

#include "heads.cuh"
#include "labels.cuh"

namespace oodkern::device {

// Each row by `lanes` threads: 8, 32 or a block.
template <class Math, class Stored>
__global__ void __launch_bounds__(kThreads, 4) binary_rows(const HeadCall call, int64_t rows, int lanes) {
  using Real = typename Math::Real;
  using Entropy = BinaryEntropy<Math>;
  constexpr int kWidth = Vector<Stored>::kWidth;
  OODKERN_SHARED(double, sums, kWarps);
  const int thread = int(threadIdx.x), lane = thread % lanes;
  const int64_t groups = kThreads / lanes;
  for (int64_t first = blockIdx.x * groups; first < rows; first += gridDim.x * groups) {
    const bool real = first + thread / lanes < rows;
    const int64_t row = real ? first + thread / lanes : rows - 1;
    const int64_t columns = real && !is_formed<Real>(call, row) ? call.columns : 0;
    const auto view = HeadRow<Stored>::of(call, row);
    const LabelRow labels = LabelRow::of<kWidth>(call, row, view.past);
    const Real classes = Real(call.columns < 1 ? 1 : call.columns);
    Real scale = 0;
    if (call.grad_logits) {
      scale = static_cast<const Real*>(call.grad_value)[row * call.grad_value_stride] / classes;
    }
    double sum = 0;  // of parts that may be many: a long row's loss is no logarithm, which would forgive it
    for (int64_t at = int64_t(lane) * kWidth - view.past; at < columns; at += kWidth * lanes) {
      Real z[1][kWidth], y[kWidth], part = 0;
      load_vectors(view.z, at, int64_t(0), columns, -Math::infinity(), z);
      read_labels(labels, at, columns, y);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Real e = Entropy::exponential(z[0][i]);
        part += Entropy::term(z[0][i], y[i], e);
        y[i] = scale * Entropy::slope(z[0][i], y[i], e);
      }
      if (view.grad) store_elements(view.grad, at, columns, view.alike, y);
      sum += double(part);
    }
    if (!call.value) continue;
    for (int bits = (lanes < 32 ? lanes : 32) / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
    if (lanes > 32) {
      if (thread % 32 == 0) sums.store(thread / 32, sum);
      __syncthreads();
      sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += sums.load(i);
      __syncthreads();  // before the next row's sums are written over these
    }
    if (real && lane == 0) static_cast<Real*>(call.value)[row] = Real(sum / double(classes));
  }
}

}  // namespace oodkern::device
