// The kernels of CLUB in closed form. With ybar and v the mean and the variance of a column of the target,
// c = y - ybar, m = mean - ybar and w = exp(-log_variance), the bound is
//
//   L = (1/N) sum_nd (v_d + c (2 m - c)) w / 2,
//
// which never squares a y that is far from 0. A slice of rows is summed about a center of its own, the rounded mean of
// its rows, so that everything is read from memory once; its target is read again, from a cache. Slices are brought to
// a common center in double, ybar rounded to Real, and what that rounding left out is put right at last, by the same
// shift: with d = y - center, e = mean - center and sums about center + s,
//
//   sum d -> sum d - n s,   sum d^2 -> sum d^2 - 2 s sum d + n s^2,   sum e w -> sum e w - s sum w,
//   sum (d e - d^2 / 2) w -> sum (d e - d^2 / 2) w - s sum e w + s^2 / 2 sum w.
#pragma once

#include <type_traits>

#include "row.cuh"

namespace oodkern::device {

// What a slice adds up of each column.
enum ClubSum { kCenter, kD, kSquare, kWeight, kMean, kContrast, kClubSums };
// What the gradients need of each column: see ClubColumns.
enum ClubColumn { kColumnCenter, kColumnRest, kColumnVariance, kColumnWeight, kColumnMean, kColumnNumbers };

constexpr int64_t kFewestRows = 4;  // of a warp in a slice
constexpr int64_t kMostRows = 64;   // that are added up in Real

template <class Stored>
struct ClubReal {
  using Type = float;
};
template <>
struct ClubReal<double> {
  using Type = double;
};

template <class Stored>
struct ClubMatrix {  // [N, D]
  Stored* data;
  int64_t stride;
  bool aligned;  // every row lies at a multiple of 16 bytes

  __device__ __forceinline__ Stored* row(int64_t n) const { return data + n * stride; }
};

template <class Stored>
struct ClubInputs {
  ClubMatrix<const Stored> mean, log_variance, target;
  int64_t N, D;
  int64_t slice_rows, slices;
  int64_t tiles;  // of 32 vectors of columns

  // Items are a slice of a tile; neighbours share their rows.
  OODKERN_HOST_DEVICE int64_t items() const { return slices * tiles; }
};

// Sums over the warps of what lanes hold of their columns: thread t < 32 kWidth gets that of column
// t % 32 * kWidth + t / 32, and `words` [kWarps * 32 * kWidth] are free again.
template <class Words, class Real, int kWidth>
__device__ __forceinline__ Real over_warps(const Words& words, const Real (&values)[kWidth]) {
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) words.store((warp * kWidth + i) * 32 + lane, values[i]);
  __syncthreads();
  Real sum = 0;
  if (thread < 32 * kWidth) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += words.load(i * 32 * kWidth + thread);
  }
  __syncthreads();
  return sum;
}

// A warp takes every kWarps-th row of a slice, a lane kWidth columns. partials [slices, kClubSums, D].
template <class Stored>
__global__ void __launch_bounds__(kThreads, 2)
    club_slices(const ClubInputs<Stored> in, typename ClubReal<Stored>::Type* partials) {
  using Real = typename ClubReal<Stored>::Type;
  using Math = std::conditional_t<sizeof(Real) == 8, Double, Float>;
  constexpr int kWidth = Vector<Stored>::kWidth;
  OODKERN_SHARED(Real, words, kWarps * 32 * kWidth);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int64_t item = blockIdx.x; item < in.items(); item += gridDim.x) {
    const int64_t slice = item / in.tiles, first = item % in.tiles * 32 * kWidth;
    const int64_t begin = slice * in.slice_rows;
    const int64_t end = begin + in.slice_rows < in.N ? begin + in.slice_rows : in.N;
    const int64_t at = first + lane * kWidth;
    // The sum of one column, where thread < 32 kWidth and there is such a column.
    const int64_t column = first + thread % 32 * kWidth + thread / 32;
    const bool writes = thread < 32 * kWidth && column < in.D;
    const auto write = [&](int which, Real sum) {
      if (writes) partials[(slice * kClubSums + which) * in.D + column] = sum;
    };

    Real center[kWidth] = {};
    for (int64_t n = begin + warp; n < end; n += kWarps) {
      Real y[kWidth];
      load_elements(in.target.row(n), at, in.D, in.target.aligned, Real(0), y);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) center[i] += y[i];
    }
    const Real rounded = over_warps(words, center) / Real(end - begin);
    write(kCenter, rounded);
    if (thread < 32 * kWidth) words.store(thread, rounded);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) center[i] = words.load(i * 32 + lane);
    __syncthreads();

    Real of_d[kWidth] = {}, square[kWidth] = {}, weight[kWidth] = {}, mean[kWidth] = {}, contrast[kWidth] = {};
    for (int64_t n = begin + warp; n < end; n += kWarps) {
      Real y[kWidth], mu[kWidth], log[kWidth];
      load_elements(in.target.row(n), at, in.D, in.target.aligned, Real(0), y);
      load_elements(in.mean.row(n), at, in.D, in.mean.aligned, Real(0), mu);
      load_elements(in.log_variance.row(n), at, in.D, in.log_variance.aligned, Real(0), log);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Real d = y[i] - center[i], e = mu[i] - center[i], w = Math::exp_of_negative(-log[i]);
        of_d[i] += d;
        square[i] += d * d;
        weight[i] += w;
        mean[i] += e * w;
        contrast[i] += (e - Real(0.5) * d) * d * w;
      }
    }
    write(kD, over_warps(words, of_d));
    write(kSquare, over_warps(words, square));
    write(kWeight, over_warps(words, weight));
    write(kMean, over_warps(words, mean));
    write(kContrast, over_warps(words, contrast));
  }
}

constexpr int kClubGroup = 8;  // columns that a block brings together, each by kThreads / kClubGroup threads

// The sum of what the threads of one column hold; every thread of the block gets that of its column.
template <class Words>
__device__ __forceinline__ double over_column(const Words& words, double value) {
  const int thread = int(threadIdx.x);
#pragma unroll
  for (int bits = kClubGroup; bits < 32; bits *= 2) value += __shfl_xor_sync(kAll, value, bits);
  if (thread % 32 < kClubGroup) words.store(thread / 32 * kClubGroup + thread % 32, value);
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += words.load(warp * kClubGroup + thread % kClubGroup);
  __syncthreads();
  return sum;
}

// Slices of all columns to columns [kColumnNumbers, D]; bounds [groups of columns] of N L.
template <class Real>
__global__ void __launch_bounds__(kThreads, 2) club_columns(const Real* partials, int64_t slices, int64_t slice_rows,
                                                            int64_t N, int64_t D, Real* columns, double* bounds) {
  OODKERN_SHARED(double, words, kWarps* kClubGroup);
  const int thread = int(threadIdx.x);
  constexpr int kStep = kThreads / kClubGroup;
  const int64_t groups = (D + kClubGroup - 1) / kClubGroup;
  const double n = N > 0 ? double(N) : 1.0;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64_t column = group * kClubGroup + thread % kClubGroup;
    const int64_t last = column < D ? slices : 0;
    const auto part = [&](int64_t slice, int which) {
      return double(partials[(slice * kClubSums + which) * D + column]);
    };
    const auto rows = [&](int64_t slice) {
      const int64_t left = N - slice * slice_rows;
      return double(left < slice_rows ? left : slice_rows);
    };
    double sum = 0;
    for (int64_t s = thread / kClubGroup; s < last; s += kStep) sum += rows(s) * part(s, kCenter) + part(s, kD);
    const Real center = Real(over_column(words, sum) / n);

    double d = 0, square = 0, weight = 0, mean = 0, contrast = 0;
    for (int64_t s = thread / kClubGroup; s < last; s += kStep) {
      const double shift = double(center) - part(s, kCenter), A = part(s, kWeight), B = part(s, kMean);
      const double D = part(s, kD), moved = D - rows(s) * shift;
      d += moved;
      square += part(s, kSquare) - shift * (D + moved);
      weight += A;
      mean += B - shift * A;
      contrast += part(s, kContrast) - shift * (B - 0.5 * shift * A);
    }
    const double rest = over_column(words, d) / n, variance = over_column(words, square) / n - rest * rest;
    weight = over_column(words, weight);
    mean = over_column(words, mean);
    contrast = over_column(words, contrast) - rest * (mean - 0.5 * rest * weight);
    mean -= rest * weight;

    const bool writes = thread < kClubGroup && column < D;
    if (writes) {
      columns[kColumnCenter * D + column] = center;
      columns[kColumnRest * D + column] = Real(rest);
      columns[kColumnVariance * D + column] = Real(variance);
      columns[kColumnWeight * D + column] = Real(weight / n);
      columns[kColumnMean * D + column] = Real(mean / n);
    }
    if (thread < 32) {
      const double bound = total<32>(writes ? 0.5 * variance * weight + contrast : 0.0);
      if (thread == 0) bounds[group] = bound;
    }
  }
}

// One warp.
template <class Real>
__global__ void __launch_bounds__(32, 2) club_value(const double* bounds, int64_t groups, int64_t N, Real* value) {
  double sum = 0;
  for (int64_t group = threadIdx.x; group < groups; group += 32) sum += bounds[group];
  sum = total<32>(sum);
  if (threadIdx.x == 0) *value = Real(sum / (N > 0 ? double(N) : 1.0));
}

// dL/dmean = c w / N, dL/dlog_variance = -(v + c (2 m - c)) w / (2 N) and, with the means over rows,
// dL/dy = ((m - c) w + mean(w) c - mean(m w)) / N. Matrices without data were not asked for.
template <class Stored>
struct ClubOutputs {
  ClubMatrix<Stored> mean, log_variance, target;
};

template <class Stored>
__global__ void __launch_bounds__(kThreads, 2)
    club_gradients(const ClubInputs<Stored> in, const typename ClubReal<Stored>::Type* grad,
                   const typename ClubReal<Stored>::Type* columns, const ClubOutputs<Stored> out) {
  using Real = typename ClubReal<Stored>::Type;
  using Math = std::conditional_t<sizeof(Real) == 8, Double, Float>;
  constexpr int kWidth = Vector<Stored>::kWidth;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  constexpr int kPart = Vector<Real>::kWidth;
  const bool aligned = reinterpret_cast<uintptr_t>(columns) % 16 == 0 && in.D % kPart == 0;
  const Real scale = Real(double(*grad) / double(in.N));
  for (int64_t item = blockIdx.x; item < in.items(); item += gridDim.x) {
    const int64_t begin = item / in.tiles * in.slice_rows, at = (item % in.tiles * 32 + lane) * kWidth;
    const int64_t end = begin + in.slice_rows < in.N ? begin + in.slice_rows : in.N;
    Real of[kColumnNumbers][kWidth / kPart][kPart];
#pragma unroll
    for (int which = 0; which < kColumnNumbers; ++which) {
#pragma unroll
      for (int j = 0; j < kWidth / kPart; ++j) {
        load_elements(columns + which * in.D, at + j * kPart, in.D, aligned, Real(0), of[which][j]);
      }
    }
    const auto column = [&](int which, int i) { return of[which][i / kPart][i % kPart]; };
    for (int64_t n = begin + warp; n < end; n += kWarps) {
      Real y[kWidth], mu[kWidth], w[kWidth], result[kWidth];
      load_elements(in.target.row(n), at, in.D, in.target.aligned, Real(0), y);
      load_elements(in.mean.row(n), at, in.D, in.mean.aligned, Real(0), mu);
      load_elements(in.log_variance.row(n), at, in.D, in.log_variance.aligned, Real(0), w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) w[i] = Math::exp_of_negative(-w[i]);
      const auto c = [&](int i) { return (y[i] - column(kColumnCenter, i)) - column(kColumnRest, i); };
      if (out.mean.data) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) result[i] = scale * c(i) * w[i];
        store_elements(out.mean.row(n), at, in.D, out.mean.aligned, result);
      }
      if (out.log_variance.data) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const Real m = (mu[i] - column(kColumnCenter, i)) - column(kColumnRest, i);
          result[i] = Real(-0.5) * scale * w[i] * (column(kColumnVariance, i) + c(i) * (Real(2) * m - c(i)));
        }
        store_elements(out.log_variance.row(n), at, in.D, out.log_variance.aligned, result);
      }
      if (out.target.data) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          result[i] = scale * ((mu[i] - y[i]) * w[i] + (column(kColumnWeight, i) * c(i) - column(kColumnMean, i)));
        }
        store_elements(out.target.row(n), at, in.D, out.target.aligned, result);
      }
    }
  }
}

}  // namespace oodkern::device
