// Room `norm` on the CPU: the L2 norm of each row, its gradient and the gradient's gradient.
//
// With u = x / |x|, an upstream gradient g and a cotangent t of the gradient g u:
//   d/dg   = t . u
//   d/dx_k = g (t_k - (t . u) u_k) / |x|
// and 0 where |x| is 0.
#include "norm.h"

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

// Rows are cut into pieces of one size, whoever works on them, and the sums of a row's pieces are added up in order: a
// result does not depend on the number of threads, and a few long rows keep all of them busy.
constexpr int64_t kPiece = 16384;

struct Sizes {
  int64_t rows, columns, pieces;

  explicit Sizes(const Rows& x)
      : rows(x.rows), columns(x.columns), pieces(std::max<int64_t>(1, (columns + kPiece - 1) / kPiece)) {}

  // Calls body(row, piece, first, count) for the pieces of all rows, in parallel.
  template <class Body>
  void for_pieces(Body&& body) const {
    parallel_for(0, rows * pieces, grain_of(std::min(columns, kPiece)), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) call(item / pieces, item % pieces, body);
    });
  }
  template <class Body>
  void of_row(int64_t row, Body&& body) const {
    for (int64_t piece = 0; piece < pieces; ++piece) call(row, piece, body);
  }
  template <class Body>
  void for_rows(Body&& body) const {
    parallel_for(0, rows, grain_of(columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
  }

 private:
  template <class Body>
  void call(int64_t row, int64_t piece, Body&& body) const {
    const int64_t first = piece * kPiece;
    body(row, piece, first, std::min(kPiece, columns - first));
  }
};

// Elements of a tensor of rows, and numbers of a column, by their place.
struct Elements {
  const char* data;
  int64_t stride, bytes;

  Elements(const Rows& rows)
      : data(static_cast<const char*>(rows.data())), stride(rows.stride), bytes(rows.tensor.element_size()) {}
  const void* at(int64_t row, int64_t column) const { return data + (row * stride + column) * bytes; }
};

struct Numbers {
  const void* data;
  int64_t stride;
  bool wide;

  Numbers(const Column& column)
      : data(column.data()), stride(column.stride), wide(column.tensor.scalar_type() == ScalarType::Double) {}
  double at(int64_t row) const { return real_of(wide, data, row * stride); }
};

void put(const Tensor& column, int64_t row, double value) {
  put_real(column.scalar_type() == ScalarType::Double, column.mutable_data_ptr(), row, value);
}

// Squares of float64 can leave the range where their root does not: such rows are read again, divided by a power of 2
// near their largest element.
double root(const NormEngine& engine, Storage storage, const Sizes& sizes, const Elements& x, int64_t row,
            double square) {
  if (storage != Storage::kFloat64 || (square > 1e-280 && square < 1e300)) return std::sqrt(square);
  double largest = 0;
  sizes.of_row(row, [&](int64_t, int64_t, int64_t first, int64_t count) {
    largest = std::max(largest, engine.largest(storage, x.at(row, first), count));
  });
  if (largest == 0 || std::isinf(largest) || std::isnan(square)) return std::sqrt(square);
  const int exponent = std::clamp(std::ilogb(largest), -1000, 1000);
  double total = 0;
  sizes.of_row(row, [&](int64_t, int64_t, int64_t first, int64_t count) {
    total += engine.square_sum(storage, x.at(row, first), count, std::ldexp(1.0, -exponent));
  });
  return std::ldexp(std::sqrt(total), exponent);
}

Tensor sample_norm(const Tensor& x) {
  check_logits(x, "x");
  const NormEngine& engine = engines().norms;
  const Storage storage = storage_of(x);
  const Rows rows = as_rows(x);
  const Sizes sizes(rows);
  const Elements elements(rows);
  std::vector<int64_t> shape = sizes_of(x);
  shape.pop_back();
  Tensor norm = empty_of(x, shape, score_dtype(x));
  if (sizes.pieces == 1) {
    sizes.for_rows([&](int64_t row) {
      const double square = engine.square_sum(storage, elements.at(row, 0), sizes.columns, 1.0);
      put(norm, row, root(engine, storage, sizes, elements, row, square));
    });
    return norm;
  }
  std::vector<double> sums(sizes.rows * sizes.pieces);
  sizes.for_pieces([&](int64_t row, int64_t piece, int64_t first, int64_t count) {
    sums[row * sizes.pieces + piece] = engine.square_sum(storage, elements.at(row, first), count, 1.0);
  });
  for (int64_t row = 0; row < sizes.rows; ++row) {
    double square = 0;
    for (int64_t piece = 0; piece < sizes.pieces; ++piece) square += sums[row * sizes.pieces + piece];
    put(norm, row, root(engine, storage, sizes, elements, row, square));
  }
  return norm;
}

double inverse_of(double norm) {
  return norm == 0 ? 0.0 : 1 / norm;
}

Tensor gradient_like(const Tensor& x) {
  Tensor result = empty_of(x, sizes_of(x), x.scalar_type());
  prefer_large_pages(result.mutable_data_ptr(), result.numel() * int64_t(result.element_size()));
  return result;
}

void check_upstream(const Tensor& grad, const Tensor& x, const Tensor& norm) {
  check_logits(x, "x");
  check_per_row(grad, "grad", x, "x");
  check_per_row(norm, "norm", x, "x");
}

Tensor sample_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& norm) {
  check_upstream(grad, x, norm);
  const NormEngine& engine = engines().norms;
  const Storage storage = storage_of(x);
  const Rows rows = as_rows(x);
  const Column upstream = as_column(grad), norms = as_column(norm);
  const Sizes sizes(rows);
  const Elements elements(rows);
  const Numbers g(upstream), n(norms);
  Tensor result = gradient_like(x);
  char* out = static_cast<char*>(result.mutable_data_ptr());
  sizes.for_pieces([&](int64_t row, int64_t, int64_t first, int64_t count) {
    void* piece = out + (row * sizes.columns + first) * elements.bytes;
    engine.scaled(storage, elements.at(row, first), count, inverse_of(n.at(row)), g.at(row), piece);
  });
  return result;
}

std::tuple<Tensor, Tensor> sample_norm_double_backward(const Tensor& cotangent, const Tensor& grad, const Tensor& x,
                                                       const Tensor& norm) {
  check_upstream(grad, x, norm);
  check_same_shape(cotangent, "cotangent", x, "x");
  const NormEngine& engine = engines().norms;
  const Storage storage = storage_of(x);
  const Rows rows = as_rows(x), directions = as_rows(cotangent);
  const Column upstream = as_column(grad), norms = as_column(norm);
  const Sizes sizes(rows);
  const Elements elements(rows), t(directions);
  const Numbers g(upstream), n(norms);
  Tensor grad_grad = empty_of(x, sizes_of(grad), score_dtype(x));
  Tensor result = gradient_like(x);
  char* out = static_cast<char*>(result.mutable_data_ptr());
  const auto dot = [&](int64_t row, int64_t first, int64_t count) {
    return engine.dot(storage, elements.at(row, first), t.at(row, first), count, inverse_of(n.at(row)));
  };
  const auto project = [&](int64_t row, int64_t first, int64_t count, double along) {
    const double inverse = inverse_of(n.at(row));
    void* piece = out + (row * sizes.columns + first) * elements.bytes;
    engine.projected(storage, elements.at(row, first), t.at(row, first), count, inverse, along, g.at(row) * inverse,
                     piece);
  };
  // A thread that takes whole rows finds them in cache the second time; where there are too few for that, pieces.
  if (sizes.rows >= 4 * int64_t(torch::stable::get_num_threads()) || sizes.pieces == 1) {
    sizes.for_rows([&](int64_t row) {
      double along = 0;
      sizes.of_row(row, [&](int64_t, int64_t, int64_t first, int64_t count) { along += dot(row, first, count); });
      put(grad_grad, row, along);
      sizes.of_row(row, [&](int64_t, int64_t, int64_t first, int64_t count) { project(row, first, count, along); });
    });
    return {grad_grad, result};
  }
  std::vector<double> dots(sizes.rows * sizes.pieces), along(sizes.rows);
  sizes.for_pieces([&](int64_t row, int64_t piece, int64_t first, int64_t count) {
    dots[row * sizes.pieces + piece] = dot(row, first, count);
  });
  for (int64_t row = 0; row < sizes.rows; ++row) {
    for (int64_t piece = 0; piece < sizes.pieces; ++piece) along[row] += dots[row * sizes.pieces + piece];
    put(grad_grad, row, along[row]);
  }
  sizes.for_pieces([&](int64_t row, int64_t, int64_t first, int64_t count) { project(row, first, count, along[row]); });
  return {grad_grad, result};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("sample_norm", TORCH_BOX(&oodkern::sample_norm));
  m.impl("sample_norm_backward", TORCH_BOX(&oodkern::sample_norm_backward));
  m.impl("sample_norm_double_backward", TORCH_BOX(&oodkern::sample_norm_double_backward));
}
