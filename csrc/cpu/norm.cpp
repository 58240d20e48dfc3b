// Room `norm` on the CPU: the L2 norm of each row, its gradient and the gradient's gradient.
#include "../norm.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "norm.h"
#include "pages.h"
#include "tiles.h"

namespace oodkern {
namespace {

// Rows are cut into pieces of one size, whoever works on them, and the sums of a row's pieces are added up in order: a
// result does not depend on the number of threads, and a few long rows keep all of them busy.
constexpr int64_t kPiece = 16384;

struct Sizes {
  int64_t rows, columns, pieces;

  Sizes(const RowCall& call, int64_t rows)
      : rows(rows), columns(call.columns), pieces(std::max<int64_t>(1, (columns + kPiece - 1) / kPiece)) {}

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

// Elements of a tensor of rows by their place.
struct Elements {
  char* data;
  int64_t stride, bytes;

  Elements(const void* rows, int64_t stride, int64_t bytes)
      : data(static_cast<char*>(const_cast<void*>(rows))), stride(stride), bytes(bytes) {}
  void* at(int64_t row, int64_t column) const { return data + (row * stride + column) * bytes; }
};

struct Norms {
  const RowCall& call;
  const NormEngine& engine;
  Sizes sizes;
  Storage storage;
  bool wide;
  Elements x, t, out;

  Norms(const RowCall& call, int64_t rows, int64_t bytes)
      : call(call),
        engine(engines().norms),
        sizes(call, rows),
        storage(call.storage),
        wide(call.storage == Storage::kFloat64),
        x(call.logits, call.logits_stride, bytes),
        t(call.cotangent, call.cotangent_stride, bytes),
        out(call.grad_logits, call.columns, bytes) {}

  double upstream(int64_t row) const { return real_of(wide, call.grad_score, row * call.grad_score_stride); }
  double inverse(int64_t row) const {
    const double norm = real_of(wide, call.saved_score, row * call.saved_score_stride);
    return norm == 0 ? 0.0 : 1 / norm;
  }

  // Squares of float64 can leave the range where their root does not: such rows are read again, divided by a power of 2
  // near their largest element.
  double root(int64_t row, double square) const {
    if (!wide || (square > 1e-280 && square < 1e300)) return std::sqrt(square);
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

  void forward() const {
    const auto square = [&](int64_t row, int64_t first, int64_t count) {
      return engine.square_sum(storage, x.at(row, first), count, 1.0);
    };
    if (sizes.pieces == 1) {
      sizes.for_rows([&](int64_t row) { put_real(wide, call.score, row, root(row, square(row, 0, sizes.columns))); });
      return;
    }
    std::vector<double> sums(sizes.rows * sizes.pieces);
    sizes.for_pieces([&](int64_t row, int64_t piece, int64_t first, int64_t count) {
      sums[row * sizes.pieces + piece] = square(row, first, count);
    });
    for (int64_t row = 0; row < sizes.rows; ++row) {
      double total = 0;
      for (int64_t piece = 0; piece < sizes.pieces; ++piece) total += sums[row * sizes.pieces + piece];
      put_real(wide, call.score, row, root(row, total));
    }
  }

  void backward() const {
    sizes.for_pieces([&](int64_t row, int64_t, int64_t first, int64_t count) {
      engine.scaled(storage, x.at(row, first), count, inverse(row), upstream(row), out.at(row, first));
    });
  }

  void double_backward() const {
    const auto dot = [&](int64_t row, int64_t first, int64_t count) {
      return engine.dot(storage, x.at(row, first), t.at(row, first), count, inverse(row));
    };
    const auto project = [&](int64_t row, int64_t first, int64_t count, double along) {
      engine.projected(storage, x.at(row, first), t.at(row, first), count, inverse(row), along,
                       upstream(row) * inverse(row), out.at(row, first));
    };
    // A thread that takes whole rows finds them in cache the second time; where there are too few for that, pieces.
    if (sizes.rows >= 4 * int64_t(torch::stable::get_num_threads()) || sizes.pieces == 1) {
      sizes.for_rows([&](int64_t row) {
        double along = 0;
        sizes.of_row(row, [&](int64_t, int64_t, int64_t first, int64_t count) { along += dot(row, first, count); });
        put_real(wide, call.grad_grad_score, row, along);
        sizes.of_row(row, [&](int64_t, int64_t, int64_t first, int64_t count) { project(row, first, count, along); });
      });
      return;
    }
    std::vector<double> dots(sizes.rows * sizes.pieces), along(sizes.rows);
    sizes.for_pieces([&](int64_t row, int64_t piece, int64_t first, int64_t count) {
      dots[row * sizes.pieces + piece] = dot(row, first, count);
    });
    for (int64_t row = 0; row < sizes.rows; ++row) {
      for (int64_t piece = 0; piece < sizes.pieces; ++piece) along[row] += dots[row * sizes.pieces + piece];
      put_real(wide, call.grad_grad_score, row, along[row]);
    }
    sizes.for_pieces(
        [&](int64_t row, int64_t, int64_t first, int64_t count) { project(row, first, count, along[row]); });
  }
};

struct CpuNorms {
  static void run(const RowCall& call, int64_t rows, const Tensor& x) {
    const Norms norms(call, rows, int64_t(x.element_size()));
    switch (call.pass) {
      case Pass::kForward: return norms.forward();
      case Pass::kBackward: return norms.backward();
      case Pass::kDoubleBackward: return norms.double_backward();
    }
  }
  static void prepare(void* data, int64_t bytes) { prefer_large_pages(data, bytes); }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  OODKERN_NORM_OPS(m, oodkern::CpuNorms);
}
