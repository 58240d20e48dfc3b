// Column sums and gradients of CLUB. A part of a row is widened, computed and rounded in the first-level cache; sums
// run along columns, so that every lane adds up a column of its own. Compiled once per instruction set.
#include "../club.h"
#include "blocks.h"

namespace oodkern::OODKERN_ISA {
namespace {

// Rows that are added up in Real before they join the sums in double.
constexpr int64_t kRows = 16;

template <class Stored>
OODKERN_INLINE const Stored* at(const void* data, int64_t stride, int64_t row, int64_t column) {
  return static_cast<const Stored*>(data) + row * stride + column;
}

template <class Real>
OODKERN_INLINE void join(const Real* part, int64_t size, double* sums) {
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) sums[k] += double(part[k]);
}

template <class Math, class Stored>
void totals(const ClubCall& call, const ClubPart& part, double* sums) {
  using Real = typename Math::Real;
  const int64_t size = part.column_end - part.column;
  alignas(64) Real sum[kClubColumns], buffer[kClubColumns];
  for (int64_t first = part.row; first < part.row_end; first += kRows) {
    const int64_t end = first + kRows < part.row_end ? first + kRows : part.row_end;
    for (int64_t k = 0; k < size; ++k) sum[k] = 0;
    for (int64_t row = first; row < end; ++row) {
      const Real* y = widen(at<Stored>(call.target, call.target_stride, row, part.column), size, buffer);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) sum[k] += y[k];
    }
    join(sum, size, sums + part.column);
  }
}

template <class Math, class Stored>
void sums(const ClubCall& call, const ClubPart& part, const void* center_of, const ClubSums& out) {
  using Real = typename Math::Real;
  const int64_t size = part.column_end - part.column;
  alignas(64) Real first_of[kClubColumns], square[kClubColumns], weight[kClubColumns], mean[kClubColumns],
      contrast[kClubColumns], y_buffer[kClubColumns], mu_buffer[kClubColumns], log_buffer[kClubColumns];
  const Real* center = static_cast<const Real*>(center_of) + part.column;
  for (int64_t first = part.row; first < part.row_end; first += kRows) {
    const int64_t end = first + kRows < part.row_end ? first + kRows : part.row_end;
    for (int64_t k = 0; k < size; ++k) first_of[k] = square[k] = weight[k] = mean[k] = contrast[k] = 0;
    for (int64_t row = first; row < end; ++row) {
      const Real* y = widen(at<Stored>(call.target, call.target_stride, row, part.column), size, y_buffer);
      const Real* mu = widen(at<Stored>(call.mean, call.mean_stride, row, part.column), size, mu_buffer);
      const Real* log =
          widen(at<Stored>(call.log_variance, call.log_variance_stride, row, part.column), size, log_buffer);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) {
        const Real d = y[k] - center[k], e = mu[k] - center[k], w = Math::exp(-log[k]);
        first_of[k] += d;
        square[k] += d * d;
        weight[k] += w;
        mean[k] += e * w;
        contrast[k] += (e - Real(0.5) * d) * d * w;
      }
    }
    join(first_of, size, out.d + part.column);
    join(square, size, out.square + part.column);
    join(weight, size, out.weight + part.column);
    join(mean, size, out.mean + part.column);
    join(contrast, size, out.contrast + part.column);
  }
}

template <class Math, class Stored>
void gradients(const ClubCall& call, const ClubPart& part, const ClubColumns& of, double upstream,
               const ClubGradients& out) {
  using Real = typename Math::Real;
  const int64_t size = part.column_end - part.column;
  alignas(64) Real y_buffer[kClubColumns], mu_buffer[kClubColumns], w[kClubColumns], c[kClubColumns],
      result[kClubColumns];
  const Real* center = static_cast<const Real*>(of.center) + part.column;
  const Real* rest = static_cast<const Real*>(of.rest) + part.column;
  const Real* variance = static_cast<const Real*>(of.variance) + part.column;
  const Real* mean_w = static_cast<const Real*>(of.weight) + part.column;
  const Real* mean_mw = static_cast<const Real*>(of.mean) + part.column;
  const Real scale = Real(upstream);
  for (int64_t row = part.row; row < part.row_end; ++row) {
    const Real* y = widen(at<Stored>(call.target, call.target_stride, row, part.column), size, y_buffer);
    const Real* mu = widen(at<Stored>(call.mean, call.mean_stride, row, part.column), size, mu_buffer);
    const Real* log = widen(at<Stored>(call.log_variance, call.log_variance_stride, row, part.column), size, result);
#pragma omp simd
    for (int64_t k = 0; k < size; ++k) {
      w[k] = Math::exp(-log[k]);
      c[k] = (y[k] - center[k]) - rest[k];
    }
    const int64_t place = row * out.columns + part.column;
    if (out.mean) {
      Real* grad = target(static_cast<Stored*>(out.mean) + place, result);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) grad[k] = scale * c[k] * w[k];
      narrow(grad, size, static_cast<Stored*>(out.mean) + place);
    }
    if (out.log_variance) {
      Real* grad = target(static_cast<Stored*>(out.log_variance) + place, result);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) {
        const Real m = (mu[k] - center[k]) - rest[k];
        grad[k] = Real(-0.5) * scale * w[k] * (variance[k] + c[k] * (Real(2) * m - c[k]));
      }
      narrow(grad, size, static_cast<Stored*>(out.log_variance) + place);
    }
    if (out.target) {
      Real* grad = target(static_cast<Stored*>(out.target) + place, result);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) {
        grad[k] = scale * ((mu[k] - y[k]) * w[k] + (mean_w[k] * c[k] - mean_mw[k]));
      }
      narrow(grad, size, static_cast<Stored*>(out.target) + place);
    }
  }
}

// Calls `work` with the types of a storage.
template <class Work>
OODKERN_INLINE void of_storage(Storage storage, Work&& work) {
  switch (storage) {
    case Storage::kFloat64: return work.template operator()<Double, double>();
    case Storage::kFloat32: return work.template operator()<Float, float>();
    case Storage::kBFloat16: return work.template operator()<Float, BFloat16>();
    case Storage::kFloat16: return work.template operator()<Float, Float16>();
  }
}

void run_totals(const ClubCall& call, const ClubPart& part, double* out) {
  of_storage(call.storage, [&]<class Math, class Stored>() { totals<Math, Stored>(call, part, out); });
}
void run_sums(const ClubCall& call, const ClubPart& part, const void* center, const ClubSums& out) {
  of_storage(call.storage, [&]<class Math, class Stored>() { sums<Math, Stored>(call, part, center, out); });
}
void run_gradients(const ClubCall& call, const ClubPart& part, const ClubColumns& of, double scale,
                   const ClubGradients& out) {
  of_storage(call.storage, [&]<class Math, class Stored>() { gradients<Math, Stored>(call, part, of, scale, out); });
}

}  // namespace

extern const ClubEngine club_engine;
const ClubEngine club_engine{run_totals, run_sums, run_gradients};

}  // namespace oodkern::OODKERN_ISA
