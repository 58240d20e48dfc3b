// The CPU engine of products that are never stored: features are gone through in waves of rows, classes in slices; the
// tile of a wave and a slice is formed by the BLAS, worked on while it is in cache, multiplied into the gradients, and
// forgotten. What it holds does not depend on N, and hardly on K.
#pragma once

#include <functional>
#include <optional>

#include "../stable.h"
#include "operand.h"

namespace oodkern {

// What a walk holds beyond arguments, results and gradients: not in it are matrices whose rows are not dense and have
// to be copied, and what a product packs for each thread.
constexpr int64_t kWorkspaceBytes = int64_t(15) << 20;

// Memory of PyTorch's allocator, given back with the object.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}
  void* take(int64_t bytes) {
    if (bytes <= 0) return nullptr;
    held_.push_back(empty_of(like_, {bytes}, ScalarType::Byte));
    return held_.back().mutable_data_ptr();
  }

 private:
  Tensor like_;
  std::vector<Tensor> held_;
};

// A gradient that is added up over tiles. Where `radial`, the operand's rows count by their direction alone, and what
// the gradient has along them is taken out at the end.
struct Gradient {
  Tensor result;  // [N, D]
  bool radial = false;
};

// Some rows of a tile.
struct Part {
  int64_t row;       // the first, in the matrix
  int64_t wave_row;  // the first, in the wave
  int64_t column;    // the first class
  Tile z;            // x w^T + bias
  Tile t;            // v w^T + x u^T + bias_t, where there is a second tile
  bool again;        // formed a second time, for dw alone: what is added up of tiles has been
};

class Walk {
 public:
  Walk(const Operand& features, const Operand& weight) : x(features), w(weight) {}

  const Operand& x;  // [N, D]
  const Operand& w;  // [K, D]
  const Operand* v = nullptr;
  const Operand* u = nullptr;
  bool second = false;
  // Where `second`: dx += t w + z u, dw += t^T x + z^T v; else dx += z w, dw += z^T x, of the tiles as on_rows left
  // them.
  Gradient* dx = nullptr;
  Gradient* dw = nullptr;
  const void* bias = nullptr;    // [K] Real, added to z
  const void* bias_t = nullptr;  // [K] Real, added to t
  // Rather all classes at once and fewer rows, where that is not too few and all sums fit.
  bool prefers_whole_rows = false;
  int64_t rows_a_thread = 512;   // of a wave, at most
  double* column_sum = nullptr;  // [K], added up of the tile that multiplies w
  bool given = false;            // on_rows fills z, or `kept` holds it, which is no product then
  // [N, kept_stride(K)] Real, where there is no second tile: z of all rows is formed in it, and stays.
  void* kept = nullptr;
  static int64_t kept_stride(int64_t K) { return K + 16; }

  // Sizes of tiles, from what was set above.
  void plan();
  int64_t wave() const { return wave_; }                  // rows: what a row has come to is kept for so many
  int64_t slice() const { return slice_; }                // classes
  bool whole_rows() const { return slice_ >= w.rows(); }  // a tile has all classes
  bool one_wave() const { return wave_ >= x.rows(); }     // a tile has all rows
  bool once() const { return whole_ || one_wave(); }      // no tile is formed a second time

  // `on_rows` is called by one thread a part; `on_columns` afterwards, with all rows of the wave and some columns.
  using Visit = std::function<void(const Part&)>;
  void run(Workspace& workspace, const Visit& on_rows, const Visit& on_columns = nullptr);

 private:
  struct Place;
  bool wide() const { return x.read() == Storage::kFloat64; }
  bool narrowed() const { return x.read() == Storage::kBFloat16 && (dx || dw); }
  bool direct(const Gradient& gradient) const;
  int64_t real() const { return wide() ? 8 : 4; }
  int64_t kept_bytes() const { return kept ? x.rows() * kept_stride(w.rows()) * real() : 0; }
  void allocate(Workspace& workspace);
  void visit(const Place& place, const Visit& on_rows, const Visit& on_columns);
  void form(const Place& place, int64_t first, int64_t count, const Visit& on_rows);
  void finish_rows(Gradient& gradient, const Operand& operand, void* rows, int64_t first, int64_t count) const;
  Tile tile(void* data, int64_t row, int64_t rows, int64_t column, int64_t columns) const;
  Matrix factor(void* reals, void* halves, int64_t row, int64_t column) const;

  int64_t wave_ = 0, slice_ = 0, block_ = 0, stride_ = 0, half_stride_ = 0;
  bool whole_ = true;  // dw is added up for all classes at once
  void *z_ = nullptr, *t_ = nullptr, *z16_ = nullptr, *t16_ = nullptr;
  void *x_ = nullptr, *w_ = nullptr, *v_ = nullptr, *u_ = nullptr;
  void *dx_ = nullptr, *dw_ = nullptr;
};

}  // namespace oodkern
