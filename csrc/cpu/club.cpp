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

#include "../check.h"
#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

constexpr int64_t kPartRows = 512;

struct Club {
  Rows mean, log_variance, target;
  ClubCall call;
  int64_t N, D;

  Club(const Tensor& mu, const Tensor& log, const Tensor& y)
      : mean(as_rows(mu)), log_variance(as_rows(log)), target(as_rows(y)), N(mu.size(0)), D(mu.size(1)) {
    call = {storage_of(mu), mean.data(),         log_variance.data(), target.data(),
            mean.stride,    log_variance.stride, target.stride};
  }
  int64_t row_parts() const { return (N + kPartRows - 1) / kPartRows; }
  // `work` on each part, with the number of its rows among parts of rows.
  template <class Work>
  void in_parts(Work&& work) const {
    const int64_t across = (D + kClubColumns - 1) / kClubColumns;
    parallel_for(0, row_parts() * across, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / across * kPartRows, column = i % across * kClubColumns;
        work(ClubPart{row, std::min(N, row + kPartRows), column, std::min(D, column + kClubColumns)}, i / across);
      }
    });
  }
};

void check_club(const Tensor& mean, const Tensor& log_variance, const Tensor& target) {
  check_matrix(mean, "mean");
  check_same_shape(log_variance, "log_variance", mean, "mean");
  check_same_shape(target, "target", mean, "mean");
}

// Sums of parts of rows [parts, D], added up in the order of the rows.
void add_up(std::vector<double>& sums, int64_t parts, int64_t D) {
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t d = 0; d < D; ++d) sums[d] += sums[p * D + d];
  }
}

// The bound and what its gradients need of columns, [5, D]: see ClubColumns.
template <class Real>
void forward(const Club& club, Real* value, Real* columns) {
  const int64_t D = club.D, parts = club.row_parts();
  const double n = double(club.N);
  std::vector<double> total(parts * D, 0.0);
  club.in_parts([&](const ClubPart& part, int64_t p) { engines().club.totals(club.call, part, total.data() + p * D); });
  add_up(total, parts, D);
  Real *center = columns, *rest = center + D, *variance = rest + D, *weight = variance + D, *mean = weight + D;
  for (int64_t d = 0; d < D; ++d) center[d] = Real(total[d] / n);

  std::vector<double> sums[5];
  for (auto& sum : sums) sum.assign(parts * D, 0.0);
  club.in_parts([&](const ClubPart& part, int64_t p) {
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

std::tuple<Tensor, Tensor> club(const Tensor& mean, const Tensor& log_variance, const Tensor& target) {
  check_club(mean, log_variance, target);
  const Club club(mean, log_variance, target);
  const ScalarType dtype = score_dtype(mean);
  Tensor value = empty_of(mean, {}, dtype), columns = empty_of(mean, {5, club.D}, dtype);
  const bool wide = dtype == ScalarType::Double;
  if (club.N == 0) {
    std::fill_n(static_cast<char*>(value.mutable_data_ptr()), value.element_size(), 0);
    std::fill_n(static_cast<char*>(columns.mutable_data_ptr()), 5 * club.D * columns.element_size(), 0);
  } else if (wide) {
    forward(club, static_cast<double*>(value.mutable_data_ptr()), static_cast<double*>(columns.mutable_data_ptr()));
  } else {
    forward(club, static_cast<float*>(value.mutable_data_ptr()), static_cast<float*>(columns.mutable_data_ptr()));
  }
  return {value, columns};
}

// dL/dmean = c w / N, dL/dlog_variance = -(v + c (2 m - c)) w / (2 N) and, with the means over rows,
// dL/dy = ((m - c) w + mean(w) c - mean(m w)) / N.
std::tuple<Tensor, Tensor, Tensor> club_backward(const Tensor& grad, const Tensor& mean, const Tensor& log_variance,
                                                 const Tensor& target, const Tensor& columns, bool for_mean,
                                                 bool for_log_variance, bool for_target) {
  check_club(mean, log_variance, target);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == score_dtype(mean),
                  "grad: expected one number in the dtype of scores");
  STD_TORCH_CHECK(
      sizes_of(columns) == (std::vector<int64_t>{5, mean.size(1)}) && columns.scalar_type() == score_dtype(mean),
      "columns: expected what club gave");
  const Club club(mean, log_variance, target);
  const bool wide = club.call.storage == Storage::kFloat64;
  const Tensor dense = torch::stable::contiguous(columns);
  const char* row = static_cast<const char*>(dense.const_data_ptr());
  const int64_t bytes = club.D * int64_t(dense.element_size());
  const ClubColumns of{row, row + bytes, row + 2 * bytes, row + 3 * bytes, row + 4 * bytes};
  Tensor results[] = {gradient_of(mean, for_mean), gradient_of(log_variance, for_log_variance),
                      gradient_of(target, for_target)};
  const auto memory = [&](int i, bool asked) {
    void* data = asked ? results[i].mutable_data_ptr() : nullptr;
    prefer_large_pages(data, results[i].numel() * int64_t(results[i].element_size()));
    return data;
  };
  const double upstream = real_of(wide, grad.const_data_ptr(), 0);
  const ClubGradients out{upstream / double(std::max<int64_t>(club.N, 1)), club.D, memory(0, for_mean),
                          memory(1, for_log_variance), memory(2, for_target)};
  club.in_parts([&](const ClubPart& part, int64_t) { engines().club.gradients(club.call, part, of, out); });
  return {results[0], results[1], results[2]};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("club", TORCH_BOX(&oodkern::club));
  m.impl("club_backward", TORCH_BOX(&oodkern::club_backward));
}
