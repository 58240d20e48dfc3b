// The walk of room `subspace`: squared norms of the projection onto a subspace and of its complement, with the
// derivatives derived in oodkern/ops/subspace.py. A wave of rows at a time; letters as there: y = U^T x,
// R = x - U y, s = U^T R, and y', R' their derivatives along the cotangents v of x and C of U.
#pragma once

#include <algorithm>

#include "pages.h"
#include "walk.h"

namespace oodkern {

template <class Real>
class Subspace {
 public:
  Subspace(const Tensor& features, const Tensor& basis)
      : x_(features, kReal), u_(basis, kReal), N(x_.rows()), D(x_.columns()), r(u_.columns()), workspace_(features) {}

  void forward(Real* inside, Real* outside) {
    plan(1, 1, 0);
    Real *y = block(r), *R = block(D);
    const auto on_rows = [&](const Wave& w) {
      project(w, y, R);
      for (int64_t i = w.first; i < w.first + w.count; ++i) {
        inside[w.row + i] = Real(square(y + i * r, r));
        outside[w.row + i] = Real(square(R + i * D, D));
      }
    };
    in_waves(on_rows, [](const Wave&, int64_t, int64_t) {});
  }

  // Gradients of sum_n g_in inside + g_out outside: dX = U q + 2 g_out R and dU = sum x q^T + R h^T, with
  // q = 2 g_in y - 2 g_out s and h = -2 g_out y. Since R = x - U y, dX = 2 g_out x + U (q + h). Of rows enough to pay
  // for it s is (I - U^T U) y, and features alone take two products with U; of few rows it is U^T R.
  void backward(const Column& g_in, const Column& g_out, const Tensor* dx, const Tensor* du) {
    const int64_t size = sizeof(Real), gap_bytes = r * r * (8 + size);
    const bool by_gap = N > r && gap_bytes <= kWorkspaceBytes / 4, residual = du || !by_gap;
    const bool in_place = dx && storage_of(*dx) == kReal;
    plan((dx && !in_place ? 1 : 0) + (residual ? 1 : 0), du ? 3 : 2,
         (du ? sums_bytes(*du) : 0) + (by_gap ? gap_bytes : 0));
    Real *y = block(r), *q = block(r), *h = du ? block(r) : nullptr, *R = residual ? block(D) : nullptr;
    Real* rounded = dx && !in_place ? block(D) : nullptr;
    Real* sums = du ? sums_of(*du) : nullptr;
    const Matrix gap{by_gap ? complement() : nullptr, r_stride()};
    if (in_place) prefer_large_pages(dx->mutable_data_ptr(), N * D * size);
    in_waves(
        [&](const Wave& w) {
          const Matrix x = residual ? project(w, y, R) : onto(w, y);
          multiply({kReal, false, false, w.count, r, by_gap ? r : D, by_gap ? rows(y, r, w) : rows(R, D, w),
                    by_gap ? gap : basis(), q + w.first * r, r_stride(), false});
          for (int64_t i = w.first; i < w.first + w.count; ++i) {
            const Real a = 2 * number(g_in, w.row + i), b = 2 * number(g_out, w.row + i);
            for (int64_t j = i * r; j < (i + 1) * r; ++j) {
              q[j] = a * y[j] - b * q[j];
              y[j] *= -b;
              if (h) h[j] = y[j];
              y[j] += q[j];
            }
          }
          if (!dx) return;
          Real* out = in_place ? static_cast<Real*>(dx->mutable_data_ptr()) + w.row * D : rounded;
          multiply({kReal, false, true, w.count, D, r, rows(y, r, w), basis(), out + w.first * D, D_stride(), false});
          for (int64_t i = w.first; i < w.first + w.count; ++i) {
            const Real b = 2 * number(g_out, w.row + i);
            const Real* own = static_cast<const Real*>(x.data) + (i - w.first) * x.stride;
            for (int64_t d = 0; d < D; ++d) out[i * D + d] += b * own[d];
            if (!in_place) write(*dx, w.row + i, out + i * D);
          }
        },
        [&](const Wave& w, int64_t from, int64_t to) {
          if (!sums) return;
          outer(w, from, to, x_.block(w.row, w.count, x_buffer_, true), q, sums, w.row > 0);
          outer(w, from, to, {R, D_stride()}, h, sums, true);
        });
    if (du) finish(*du, sums);
  }

  // With a = 2 g_in and b = 2 g_out: dX = b R' + U p + C q and dU = sum x p^T + v q^T + R' h^T + R k^T, with
  // p = a y' - b (C^T R + U^T R'), q = a y - b s, h = -b y, k = -b y'.
  void double_backward(const Tensor* features_cotangent, const Tensor* basis_cotangent, const Column& g_in,
                       const Column& g_out, Real* d_in, Real* d_out, const Tensor* dx, const Tensor* du) {
    std::optional<Operand> v, c;
    if (features_cotangent) v.emplace(*features_cotangent, kReal);
    if (basis_cotangent) c.emplace(*basis_cotangent, kReal);
    const int64_t copies = (v && !v->in_place() ? 1 : 0) + 3;
    const int64_t c_bytes = c && !c->in_place() ? D * r * int64_t(sizeof(Real)) : 0;
    plan(copies, 6, (du ? sums_bytes(*du) : 0) + c_bytes);
    Real *y = block(r), *y1 = block(r), *p = block(r), *q = block(r), *h = block(r), *k = block(r);
    Real *R = block(D), *R1 = block(D), *out = block(D);
    Real* v_buffer = v && !v->in_place() ? block(D) : nullptr;
    Real* sums = du ? sums_of(*du) : nullptr;
    Matrix C{};
    if (c) C = c->block(0, D, c_bytes ? workspace_.take(c_bytes) : nullptr);
    in_waves(
        [&](const Wave& w) {
          const Matrix x = project(w, y, R);
          const auto down = [&](Matrix from, Matrix onto, Real* to, bool more) {  // [rows, D] -> [rows, r]
            multiply({kReal, false, false, w.count, r, D, from, onto, to + w.first * r, r_stride(), more});
          };
          const auto up = [&](Real* from, Matrix onto, Real* to, bool more) {  // [rows, r] -> [rows, D]
            multiply({kReal, false, true, w.count, D, r, rows(from, r, w), onto, to + w.first * D, D_stride(), more});
          };
          Matrix vs{};
          if (v) vs = v->block(w.row + w.first, w.count, v_buffer ? v_buffer + w.first * D : nullptr);
          if (v) down(vs, basis(), y1, false);
          if (c) down(x, C, y1, v.has_value());
          up(y1, basis(), R1, false);
          if (c) up(y, C, R1, true);
          for (int64_t i = w.first; i < w.first + w.count; ++i) {
            const Real* own = v ? static_cast<const Real*>(vs.data) + (i - w.first) * vs.stride : nullptr;
            for (int64_t d = 0; d < D; ++d) R1[i * D + d] = (own ? own[d] : Real(0)) - R1[i * D + d];
          }
          down(rows(R, D, w), basis(), q, false);
          down(rows(R1, D, w), basis(), p, false);
          if (c) down(rows(R, D, w), C, p, true);
          for (int64_t i = w.first; i < w.first + w.count; ++i) {
            d_in[w.row + i] = 2 * Real(dot(y + i * r, y1 + i * r, r));
            d_out[w.row + i] = 2 * Real(dot(R + i * D, R1 + i * D, D));
            const Real a = 2 * number(g_in, w.row + i), b = 2 * number(g_out, w.row + i);
            for (int64_t j = i * r; j < (i + 1) * r; ++j) {
              p[j] = a * y1[j] - b * p[j];
              q[j] = a * y[j] - b * q[j];
              h[j] = -b * y[j];
              k[j] = -b * y1[j];
            }
          }
          if (!dx) return;
          up(p, basis(), out, false);
          if (c) up(q, C, out, true);
          for (int64_t i = w.first; i < w.first + w.count; ++i) {
            const Real b = 2 * number(g_out, w.row + i);
            for (int64_t d = i * D; d < (i + 1) * D; ++d) out[d] += b * R1[d];
            write(*dx, w.row + i, out + i * D);
          }
        },
        [&](const Wave& w, int64_t from, int64_t to) {
          if (!sums) return;
          outer(w, from, to, x_.block(w.row, w.count, x_buffer_, true), p, sums, w.row > 0);
          if (v) outer(w, from, to, v->block(w.row, w.count, v_buffer, true), q, sums, true);
          outer(w, from, to, {R1, D_stride()}, h, sums, true);
          outer(w, from, to, {R, D_stride()}, k, sums, true);
        });
    if (du) finish(*du, sums);
  }

 private:
  static constexpr Storage kReal = sizeof(Real) == 8 ? Storage::kFloat64 : Storage::kFloat32;

  // Rows [first, first + count) of a wave that begins at `row`.
  struct Wave {
    int64_t row, first, count;
  };

  // As many rows as the workspace holds with so many blocks of D and of r numbers a row.
  void plan(int64_t blocks_of_D, int64_t blocks_of_r, int64_t other_bytes) {
    const int64_t size = sizeof(Real);
    const int64_t basis_bytes = u_.in_place() ? 0 : D * r * size;
    const int64_t row = ((blocks_of_D + (x_.in_place() ? 0 : 1)) * D + blocks_of_r * r + 1) * size;
    wave_ = std::clamp<int64_t>((kWorkspaceBytes - basis_bytes - other_bytes) / row, 16, 1024);
    wave_ = std::min(wave_, std::max<int64_t>(N, 1));
    void* buffer = u_.in_place() ? nullptr : workspace_.take(basis_bytes);
    basis_ = u_.block(0, D, buffer);
    if (!x_.in_place()) x_buffer_ = block(D);
  }
  Real* block(int64_t columns) { return static_cast<Real*>(workspace_.take(wave_ * columns * int64_t(sizeof(Real)))); }
  Matrix basis() const { return basis_; }
  int64_t r_stride() const { return std::max<int64_t>(r, 1); }
  int64_t D_stride() const { return std::max<int64_t>(D, 1); }
  Matrix rows(const Real* data, int64_t columns, const Wave& w) const {
    return {data + w.first * columns, std::max<int64_t>(columns, 1)};
  }

  // `on_rows` for each thread's rows of a wave, then `on_features` for each thread's share of the D features.
  template <class OnRows, class OnFeatures>
  void in_waves(OnRows&& on_rows, OnFeatures&& on_features) {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t each = (wave_ + threads - 1) / threads, share = (D + threads - 1) / threads;
    for (int64_t row = 0; row < N; row += wave_) {
      const int64_t count = std::min(wave_, N - row);
      parallel_for(0, (count + each - 1) / each, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) on_rows(Wave{row, b * each, std::min(each, count - b * each)});
      });
      parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t from = std::min(D, t * share), to = std::min(D, from + share);
          if (from < to) on_features(Wave{row, 0, count}, from, to);
        }
      });
    }
  }

  // I - U^T U, [r, r]. Summed in double, some features at a time: what is left of the subtraction is rounding.
  const Real* complement() {
    constexpr int64_t kAtOnce = 64;
    double* sums = static_cast<double*>(workspace_.take(r * r * 8));
    Real* part = static_cast<Real*>(workspace_.take(r * r * int64_t(sizeof(Real))));
    for (int64_t i = 0; i < r * r; ++i) sums[i] = 0;
    for (int64_t d = 0; d < D; d += kAtOnce) {
      const Matrix some{static_cast<const Real*>(basis().data) + d * basis().stride, basis().stride};
      multiply({kReal, true, false, r, r, std::min(kAtOnce, D - d), some, some, part, r_stride(), false});
      for (int64_t i = 0; i < r * r; ++i) sums[i] += part[i];
    }
    for (int64_t i = 0; i < r * r; ++i) part[i] = Real((i % (r + 1) == 0) - sums[i]);
    return part;
  }

  // y = x U; returns the rows of x.
  Matrix onto(const Wave& w, Real* y) const {
    const Matrix x = x_.block(w.row + w.first, w.count, x_buffer_ ? x_buffer_ + w.first * D : nullptr);
    multiply({kReal, false, false, w.count, r, D, x, basis(), y + w.first * r, r_stride(), false});
    return x;
  }

  // y = x U and R = x - y U^T; returns the rows of x.
  Matrix project(const Wave& w, Real* y, Real* R) const {
    const Matrix x = onto(w, y);
    multiply({kReal, false, true, w.count, D, r, rows(y, r, w), basis(), R + w.first * D, D_stride(), false});
    for (int64_t i = 0; i < w.count; ++i) {
      const Real* own = static_cast<const Real*>(x.data) + i * x.stride;
      Real* residual = R + (w.first + i) * D;
      for (int64_t d = 0; d < D; ++d) residual[d] = own[d] - residual[d];
    }
    return x;
  }

  // sums[from:to, :] (+)= rows^T right, over the rows of a wave.
  void outer(const Wave& w, int64_t from, int64_t to, Matrix left, const Real* right, Real* sums, bool more) const {
    const Matrix part{static_cast<const Real*>(left.data) + from, left.stride};
    multiply({kReal, true, false, to - from, r, w.count, part, {right, r_stride()}, sums + from * r, r_stride(), more});
  }

  static double dot(const Real* a, const Real* b, int64_t count) {
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += double(a[j]) * double(b[j]);
    return sum;
  }
  static double square(const Real* a, int64_t count) { return tile_engine().square_sum(kReal, a, count); }
  static Real number(const Column& column, int64_t i) {
    return static_cast<const Real*>(column.data())[i * column.stride];
  }
  void write(const Tensor& out, int64_t row, const Real* numbers) const {
    const Storage storage = storage_of(out);
    tile_engine().narrow(storage, numbers, D, static_cast<char*>(out.mutable_data_ptr()) + row * D * bytes_of(storage));
  }
  int64_t sums_bytes(const Tensor& out) const { return storage_of(out) == kReal ? 0 : D * r * int64_t(sizeof(Real)); }
  Real* sums_of(const Tensor& out) {
    Real* sums =
        static_cast<Real*>(storage_of(out) == kReal ? out.mutable_data_ptr() : workspace_.take(sums_bytes(out)));
    if (N == 0 && D * r > 0) std::fill(sums, sums + D * r, Real(0));
    return sums;
  }
  void finish(const Tensor& out, const Real* sums) const {
    if (storage_of(out) != kReal) tile_engine().narrow(storage_of(out), sums, D * r, out.mutable_data_ptr());
  }

  Operand x_, u_;  // [N, D], [D, r]
  int64_t N, D, r, wave_ = 0;
  Workspace workspace_;
  Matrix basis_{};
  Real* x_buffer_ = nullptr;
};

}  // namespace oodkern
