#include "walk.h"

#include <algorithm>
#include <cstring>

#include "pages.h"

namespace oodkern {
namespace {

// Rows of a tile that are worked on at once: their numbers stay in the second-level cache from one pass to the next.
constexpr int64_t kRowsAtOnce = 32;

char* at(void* data, int64_t bytes) {
  return static_cast<char*>(data) + bytes;
}
const char* at(const void* data, int64_t bytes) {
  return static_cast<const char*>(data) + bytes;
}
int64_t threads() {
  return std::max<int64_t>(1, torch::stable::get_num_threads());
}
// The part of [0, size) that falls to one of `parts`, in steps of 16.
std::pair<int64_t, int64_t> share(int64_t size, int64_t parts, int64_t part) {
  const int64_t step = ((size + parts - 1) / parts + 15) / 16 * 16;
  return {std::min(size, part * step), std::min(size, (part + 1) * step)};
}

}  // namespace

struct Walk::Place {
  int64_t row, rows, column, columns;
  bool first_wave, last_wave, first_slice, last_slice;
  bool copy_x, copy_w, again;
};

bool Walk::direct(const Gradient& gradient) const {
  return bytes_of(storage_of(gradient.result)) == real();
}

// The tile, operands that have to be copied and gradients that have to be rounded share the workspace. Up to it larger
// is better: a wave of R rows reads the slice's weights once for 2 R operations a number, and the other way round.
void Walk::plan() {
  const int64_t N = x.rows(), D = x.columns(), K = w.rows();
  int64_t budget = std::max<int64_t>(0, kWorkspaceBytes - K * 8 - kept_bytes());
  whole_ = true;
  if (dw && !direct(*dw)) {
    whole_ = K * D * real() <= kWorkspaceBytes * 2 / 5;
    if (whole_) budget -= K * D * real();
  }
  wave_ = std::min(std::max<int64_t>(N, 1), std::min<int64_t>(rows_a_thread * threads(), 4096));
  slice_ = std::min<int64_t>(std::max<int64_t>(K, 1), 1024);
  const auto needs = [&](int64_t R, int64_t S) {
    int64_t bytes = (second ? 2 : 1) * R * (S + 16) * ((kept ? 0 : real()) + (narrowed() ? 2 : 0));
    if (!x.in_place()) bytes += R * D * real();
    if (!w.in_place()) bytes += S * D * real();
    if (v && !v->in_place()) bytes += R * D * real();
    if (u && !u->in_place()) bytes += S * D * real();
    if (dx && !direct(*dx)) bytes += R * D * real();
    if (dw && !whole_) bytes += S * D * real();
    return bytes;
  };
  if (prefers_whole_rows) {
    // With fewer rows a thread, packing the weights anew for every wave takes more than forming a tile twice.
    constexpr int64_t kFewest = 64;
    int64_t rows = wave_;
    while (needs(rows, K) > budget && rows > kFewest * threads()) rows = std::max<int64_t>(rows - 16, 1);
    const int64_t waves = std::max<int64_t>(1, (N + rows - 1) / rows);
    rows = std::max<int64_t>(1, (N + waves - 1) / waves);
    if (needs(rows, K) <= budget) wave_ = rows, slice_ = std::max<int64_t>(K, 1), whole_ = true;
  }
  while (needs(wave_, slice_) > budget && (wave_ > 16 || slice_ > 16)) {
    int64_t& larger = wave_ > slice_ ? wave_ : slice_;
    larger = (larger + 1) / 2;
  }
  // A row of tiles that is a power of two long would share its cache sets with the next ones.
  half_stride_ = slice_ + 16;
  stride_ = kept ? kept_stride(K) : half_stride_;
  block_ = std::max<int64_t>(std::min<int64_t>(wave_, 16), (wave_ + threads() - 1) / threads());
}

void Walk::allocate(Workspace& workspace) {
  const int64_t D = x.columns(), K = w.rows(), tile = wave_ * half_stride_;
  for (Gradient* gradient : {dx, dw}) {
    if (!gradient) continue;
    const Tensor& result = gradient->result;
    prefer_large_pages(result.mutable_data_ptr(), result.numel() * int64_t(result.element_size()));
  }
  if (!kept) z_ = workspace.take(tile * real());
  if (second) t_ = workspace.take(tile * real());
  if (narrowed()) {
    z16_ = workspace.take(tile * 2);
    if (second) t16_ = workspace.take(tile * 2);
  }
  if (!x.in_place()) x_ = workspace.take(wave_ * D * bytes_of(x.read()));
  if (!w.in_place()) w_ = workspace.take(slice_ * D * bytes_of(w.read()));
  if (v && !v->in_place()) v_ = workspace.take(wave_ * D * bytes_of(v->read()));
  if (u && !u->in_place()) u_ = workspace.take(slice_ * D * bytes_of(u->read()));
  if (dx && !direct(*dx)) dx_ = workspace.take(wave_ * D * real());
  if (dw && !direct(*dw)) dw_ = workspace.take((whole_ ? K : slice_) * D * real());
}

Tile Walk::tile(void* data, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
  return {wide(), rows, columns, data ? at(data, (row * stride_ + column) * real()) : nullptr, stride_};
}

// A tile as the BLAS reads it when it is multiplied into a gradient.
Matrix Walk::factor(void* reals, void* halves, int64_t row, int64_t column) const {
  if (narrowed()) return {at(halves, (row * half_stride_ + column) * 2), half_stride_};
  return {at(reals, (row * stride_ + column) * real()), stride_};
}

// Sums of rows become results: less their radial part, rounded where they are in the workspace.
void Walk::finish_rows(Gradient& gradient, const Operand& operand, void* rows, int64_t first, int64_t count) const {
  const int64_t D = operand.columns();
  const Storage storage = storage_of(gradient.result);
  std::vector<char> direction(gradient.radial ? D * real() : 0);
  for (int64_t i = 0; i < count; ++i) {
    void* sums = at(rows, i * D * real());
    if (gradient.radial) {
      const void* row = operand.row(first + i);
      const double square = tile_engine().square_sum(operand.stored(), row, D);
      tile_engine().widen(operand.stored(), row, D, direction.data());
      tile_engine().remove(wide(), sums, direction.data(), D, square == 0 ? 0.0 : 1 / square);
    }
    if (direct(gradient)) continue;
    void* out = at(gradient.result.mutable_data_ptr(), (first + i) * D * bytes_of(storage));
    tile_engine().narrow(storage, sums, D, out);
  }
}

// One thread's rows [first, first + count) of the wave.
void Walk::form(const Place& p, int64_t first, int64_t count, const Visit& on_rows) {
  const int64_t D = x.columns();
  const auto rows_of = [&](const Operand& operand, void* buffer) {
    void* own = buffer ? at(buffer, first * D * bytes_of(operand.read())) : nullptr;
    return operand.block(p.row + first, count, own, !p.copy_x);
  };
  const Matrix xs = rows_of(x, x_), ws = w.block(p.column, p.columns, w_, true);
  const auto of_slice = [&](const void* row) { return row ? at(row, p.column * real()) : nullptr; };
  void* const z = at(z_, first * stride_ * real());
  void* const t = second ? at(t_, first * stride_ * real()) : nullptr;
  if (!given) multiply({x.read(), false, true, count, p.columns, D, xs, ws, z, stride_, false, of_slice(bias)});
  Matrix vs{}, us{};
  if (second) {
    if (v) {
      vs = rows_of(*v, v_);
      multiply({x.read(), false, true, count, p.columns, D, vs, ws, t, stride_, false, of_slice(bias_t)});
    }
    for (int64_t i = 0; i < count && !v; ++i) {
      void* row = at(t, i * stride_ * real());
      bias_t ? std::memcpy(row, of_slice(bias_t), p.columns * real()) : std::memset(row, 0, p.columns * real());
    }
    if (u) {
      us = u->block(p.column, p.columns, u_, true);
      multiply({x.read(), false, true, count, p.columns, D, xs, us, t, stride_, true});
    }
  }
  for (int64_t i = 0; i < count; i += kRowsAtOnce) {
    const int64_t begin = first + i, rows = std::min(kRowsAtOnce, count - i);
    on_rows({p.row + begin, begin, p.column, tile(z_, begin, rows, 0, p.columns), tile(t_, begin, rows, 0, p.columns),
             p.again});
    for (int64_t row = begin; row < begin + rows && narrowed(); ++row) {
      const int64_t from = row * stride_ * real(), to = row * half_stride_ * 2;
      tile_engine().narrow(Storage::kBFloat16, at(z_, from), p.columns, at(z16_, to));
      if (second) tile_engine().narrow(Storage::kBFloat16, at(t_, from), p.columns, at(t16_, to));
    }
  }
  if (!dx) return;
  void* sums =
      direct(*dx) ? at(dx->result.mutable_data_ptr(), (p.row + first) * D * real()) : at(dx_, first * D * real());
  const Matrix by_z = factor(z_, z16_, first, 0), by_t = second ? factor(t_, t16_, first, 0) : Matrix{};
  multiply({x.read(), false, false, count, D, p.columns, second ? by_t : by_z, ws, sums, D, !p.first_slice});
  if (u) multiply({x.read(), false, false, count, D, p.columns, by_z, us, sums, D, true});
  if (p.last_slice) finish_rows(*dx, x, sums, p.row + first, count);
}

void Walk::visit(const Place& p, const Visit& on_rows, const Visit& on_columns) {
  const int64_t D = x.columns(), parts = threads();
  if (kept) z_ = at(kept, (p.row * stride_ + p.column) * real());
  if (p.copy_w) {
    parallel_for(0, p.columns, 64, [&](int64_t begin, int64_t end) {
      const auto copy = [&](const Operand& operand, void* buffer) {
        if (!operand.in_place()) {
          operand.block(p.column + begin, end - begin, at(buffer, begin * D * bytes_of(operand.read())));
        }
      };
      copy(w, w_);
      if (u) copy(*u, u_);
    });
  }
  const int64_t blocks = std::max<int64_t>(1, (p.rows + block_ - 1) / block_);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) form(p, b * block_, std::min(block_, p.rows - b * block_), on_rows);
  });
  if (!dw && !column_sum && !on_columns) return;

  void* w_sums = nullptr;
  if (dw) {
    w_sums = direct(*dw) ? at(dw->result.mutable_data_ptr(), p.column * D * real())
                         : at(dw_, (whole_ ? p.column : 0) * D * real());
  }
  const Matrix xs = x.block(p.row, p.rows, x_, true);
  const bool by_class = p.columns >= D;  // the longer side is shared out
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const auto [low, high] = share(p.columns, parts, part);
      if (low < high) {
        void* left = second ? t_ : z_;
        if (column_sum) tile_engine().column_sums(tile(left, 0, p.rows, low, high - low), column_sum + p.column + low);
        if (on_columns) {
          on_columns({p.row, 0, p.column + low, tile(z_, 0, p.rows, low, high - low),
                      tile(t_, 0, p.rows, low, high - low), p.again});
        }
      }
      if (!dw) continue;
      const auto [from, to] = share(by_class ? p.columns : D, parts, part);
      const int64_t c = by_class ? from : 0, d = by_class ? 0 : from;
      const int64_t count = by_class ? to - from : p.columns, width = by_class ? D : to - from;
      if (from >= to) continue;
      void* sums = at(w_sums, (c * D + d) * real());
      const auto shifted = [&](Matrix m) { return Matrix{at(m.data, d * bytes_of(x.read())), m.stride}; };
      const Matrix left = second ? factor(t_, t16_, 0, c) : factor(z_, z16_, 0, c);
      multiply({x.read(), true, false, count, width, p.rows, left, shifted(xs), sums, D, !p.first_wave});
      if (v) {
        const Matrix vs = v->block(p.row, p.rows, v_, true);
        multiply({x.read(), true, false, count, width, p.rows, factor(z_, z16_, 0, c), shifted(vs), sums, D, true});
      }
    }
  });
  if (dw && p.last_wave && (dw->radial || !direct(*dw))) {
    parallel_for(0, p.columns, 16, [&](int64_t begin, int64_t end) {
      finish_rows(*dw, w, at(w_sums, begin * D * real()), p.column + begin, end - begin);
    });
  }
}

void Walk::run(Workspace& workspace, const Visit& on_rows, const Visit& on_columns) {
  const int64_t N = x.rows(), K = w.rows();
  allocate(workspace);
  const int64_t waves = std::max<int64_t>(1, (N + wave_ - 1) / wave_);
  const int64_t slices = std::max<int64_t>(1, (K + slice_ - 1) / slice_);
  const auto place = [&](int64_t wave, int64_t slice, bool copy_x, bool copy_w, bool again = false) {
    const int64_t row = wave * wave_, column = slice * slice_;
    visit({row, std::min(wave_, N - row), column, std::min(slice_, K - column), wave == 0, wave == waves - 1,
           slice == 0, slice == slices - 1, copy_x, copy_w, again},
          on_rows, on_columns);
  };
  if (whole_ || waves == 1) {
    for (int64_t i = 0; i < waves; ++i) {
      for (int64_t j = 0; j < slices; ++j) place(i, j, j == 0, j == 0 ? i == 0 || slices > 1 : true);
    }
    return;
  }
  // The sums of all classes do not fit, and a slice's are not complete after one wave: rows' gradients first, then
  // classes' slice by slice, each tile formed twice.
  Gradient* const classes = dw;
  double* const sums = column_sum;
  if (dx) {
    dw = nullptr, column_sum = nullptr;
    for (int64_t i = 0; i < waves; ++i) {
      for (int64_t j = 0; j < slices; ++j) place(i, j, j == 0, true);
    }
    dw = classes, column_sum = sums;
  }
  Gradient* const rows = dx;
  dx = nullptr;
  for (int64_t j = 0; j < slices; ++j) {
    for (int64_t i = 0; i < waves; ++i) place(i, j, true, i == 0, rows != nullptr);
  }
  dx = rows;
}

}  // namespace oodkern
