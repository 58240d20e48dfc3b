// Room `contrast` on the CPU: CLUB in closed form, in two passes over the target and one over the rest.
//
// With ybar and v the mean and the variance of a column of the target, c = y - ybar, m = mean - ybar and
// w = exp(-log_variance), the bound is
//
//   L = (1/N) sum_nd (v_d + c (2 m - c)) w / 2,
//
// which never squares a y that is far from 0. What is summed is centered by `center`, ybar rounded to Real; what
// rounding left out, `rest`, is put right afterwards: with d = y - center and e = mean - center,
//
//   sum_n (c m - c^2 / 2) w = sum_n (d e - d^2 / 2) w - rest sum_n e w + rest^2 / 2 sum_n w.
#include <algorithm>

#include "../club.h"
#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

constexpr int64_t kPartRows = 512;

int64_t row_parts(const Club& club) {
  return (club.N + kPartRows - 1) / kPartRows;
}
// `work` on each part, with the number of its rows among parts of rows.
template <class Work>
void in_parts(const Club& club, Work&& work) {
  const int64_t across = (club.D + kClubColumns - 1) / kClubColumns;
  parallel_for(0, row_parts(club) * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * kPartRows, column = i % across * kClubColumns;
      work(ClubPart{row, std::min(club.N, row + kPartRows), column, std::min(club.D, column + kClubColumns)},
           i / across);
    }
  });
}

// Sums of parts of rows [parts, D], added up in the order of the rows.
void add_up(std::vector<double>& sums, int64_t parts, int64_t D) {
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t d = 0; d < D; ++d) sums[d] += sums[p * D + d];
  }
}

// The bound and what its gradients need of columns, [5, D]: see ClubColumns.
template <class Real>
void sums_of(const Club& club, Real* value, Real* columns) {
  const int64_t D = club.D, parts = row_parts(club);
  const double n = double(club.N);
  std::vector<double> total(parts * D, 0.0);
  in_parts(club,
           [&](const ClubPart& part, int64_t p) { engines().club.totals(club.call, part, total.data() + p * D); });
  add_up(total, parts, D);
  Real *center = columns, *rest = center + D, *variance = rest + D, *weight = variance + D, *mean = weight + D;
  for (int64_t d = 0; d < D; ++d) center[d] = Real(total[d] / n);

  std::vector<double> sums[5];
  for (auto& sum : sums) sum.assign(parts * D, 0.0);
  in_parts(club, [&](const ClubPart& part, int64_t p) {
    const int64_t at = p * D;
    engines().club.sums(
        club.call, part, center,
        {sums[0].data() + at, sums[1].data() + at, sums[2].data() + at, sums[3].data() + at, sums[4].data() + at});
  });
  for (auto& sum : sums) add_up(sum, parts, D);
  double bound = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double r = sums[0][d] / n, v = sums[1][d] / n - r * r, A = sums[2][d], B = sums[3][d];
    bound += 0.5 * v * A + sums[4][d] - r * B + 0.5 * r * r * A;
    rest[d] = Real(r);
    variance[d] = Real(v);
    weight[d] = Real(A / n);
    mean[d] = Real((B - r * A) / n);
  }
  *value = Real(bound / n);
}

struct CpuClub {
  static void forward(const Club& club, const Tensor& mean, Tensor& value, Tensor& columns) {
    if (club.N == 0) {
      std::fill_n(static_cast<char*>(value.mutable_data_ptr()), value.element_size(), 0);
      std::fill_n(static_cast<char*>(columns.mutable_data_ptr()), 5 * club.D * columns.element_size(), 0);
    } else if (score_dtype(mean) == ScalarType::Double) {
      sums_of(club, static_cast<double*>(value.mutable_data_ptr()), static_cast<double*>(columns.mutable_data_ptr()));
    } else {
      sums_of(club, static_cast<float*>(value.mutable_data_ptr()), static_cast<float*>(columns.mutable_data_ptr()));
    }
  }

  // dL/dmean = c w / N, dL/dlog_variance = -(v + c (2 m - c)) w / (2 N) and, with the means over rows,
  // dL/dy = ((m - c) w + mean(w) c - mean(m w)) / N.
  static void backward(const Club& club, const Tensor&, const Tensor& grad, const ClubColumns& columns,
                       const ClubGradients& out) {
    const double upstream = real_of(club.call.storage == Storage::kFloat64, grad.const_data_ptr(), 0);
    const double scale = upstream / double(std::max<int64_t>(club.N, 1));
    in_parts(club,
             [&](const ClubPart& part, int64_t) { engines().club.gradients(club.call, part, columns, scale, out); });
  }

  static void prepare(void* data, int64_t bytes) { prefer_large_pages(data, bytes); }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  OODKERN_CLUB_OPS(m, oodkern::CpuClub);
}
