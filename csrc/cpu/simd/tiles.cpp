// The work on tiles of products: reductions of their rows and columns, slopes and curvatures in place.
// Compiled once per instruction set.
#include "tile_rows.h"

namespace oodkern::OODKERN_ISA {
namespace {

void widen_row(Storage from, const void* source, int64_t count, void* target) {
  with_storage(from, [&](auto stored, auto real) {
    using Real = decltype(real);
    const auto* in = static_cast<const decltype(stored)*>(source);
    auto* out = static_cast<Real*>(target);
    if (const Real* same = widen(in, count, out); same != out) __builtin_memcpy(out, same, count * sizeof(Real));
  });
}

void narrow_row(Storage to, const void* source, int64_t count, void* target) {
  with_storage(to, [&](auto stored, auto real) {
    const auto* in = static_cast<const decltype(real)*>(source);
    auto* out = static_cast<decltype(stored)*>(target);
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) store(out + k, in[k]);
  });
}

// Calls body(x, at, size) for a row as Real: for all of it, or for blocks of it where they have to be widened.
template <class Stored, class Real, class Body>
OODKERN_INLINE void over_blocks(const Stored* row, int64_t count, Real*, Body&& body) {
  constexpr bool kSame = sizeof(Stored) == sizeof(Real);
  alignas(64) Real buffer[kSame ? 1 : kBlock];
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t size = kSame ? count : block_size(count, at);
    body(widen(row + at, size, buffer), at, size);
    if (kSame) return;
  }
}

// Squares are added up in double: a norm is then exact to the rounding of its own.
double square_sum(Storage storage, const void* row, int64_t count) {
  double total = 0;
  with_storage(storage, [&](auto stored, auto real) {
    const auto add_up = [&](const auto* x, int64_t, int64_t size) __attribute__((always_inline)) {
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < size; ++k) total += double(x[k]) * double(x[k]);
    };
    over_blocks(static_cast<const decltype(stored)*>(row), count, &real, add_up);
  });
  return total;
}

double square_distance(Storage of_a, const void* a, double scale, Storage of_b, const void* b, int64_t count) {
  double total = 0;
  with_storage(of_a, [&](auto stored, auto real) {
    using Stored = decltype(stored);
    using Real = decltype(real);
    const auto with = [&](const auto* y) __attribute__((always_inline)) {
      const auto add_up = [&](const Real* x, int64_t at, int64_t size) __attribute__((always_inline)) {
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < size; ++k) {
          const double difference = scale * double(x[k]) - double(load(y[at + k]));
          total += difference * difference;
        }
      };
      over_blocks(static_cast<const Stored*>(a), count, &real, add_up);
    };
    of_a == of_b ? with(static_cast<const Stored*>(b)) : with(static_cast<const Real*>(b));
  });
  return total;
}

void remove_direction(bool wide, void* row, const void* direction, int64_t count, double scale) {
  with_math(wide, [&](auto math) {
    using Real = typename decltype(math)::Real;
    auto* x = static_cast<Real*>(row);
    const auto* d = reals<Real>(direction);
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t k = 0; k < count; ++k) dot += double(x[k]) * double(d[k]);
    const Real along = Real(dot * scale);
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) x[k] -= along * d[k];
  });
}

void affine(const Tile& tile, const void* row_scale, const void* column_scale, const void* bias) {
  with_math(tile.wide, [&](auto math) {
    using Real = typename decltype(math)::Real;
    const Real* c = reals<Real>(column_scale);
    const Real* b = reals<Real>(bias);
    for (int64_t row = 0; row < tile.rows; ++row) {
      Real* z = row_of<Real>(tile, row);
      const Real r = row_scale ? reals<Real>(row_scale)[row] : Real(1);
      if (c) {
#pragma omp simd
        for (int64_t k = 0; k < tile.columns; ++k) z[k] = z[k] * r * c[k];  // r c alone may leave the range
      } else if (row_scale) {
#pragma omp simd
        for (int64_t k = 0; k < tile.columns; ++k) z[k] *= r;
      }
      if (b) {
#pragma omp simd
        for (int64_t k = 0; k < tile.columns; ++k) z[k] += b[k];
      }
    }
  });
}

void begin(Reduce reduce, int64_t rows, RowState* state) {
  with_reducer(true, reduce, [&](auto, auto reducer) {
    const auto first = reducer.init();
    for (int64_t row = 0; row < rows; ++row) state[row] = {first.maximum, first.sum};
  });
}

void finish(bool wide, Reduce how, int64_t rows, const RowState* state, double sign, void* out) {
  with_reducer(wide, how, [&](auto math, auto reducer) {
    using Real = typename decltype(math)::Real;
    for (int64_t row = 0; row < rows; ++row) {
      const typename decltype(reducer)::State s{Real(state[row].maximum), state[row].sum};
      static_cast<Real*>(out)[row] = Real(sign) * reducer.value(s);
    }
  });
}

void slope(const Tile& tile, Reduce how, const void* value, const void* scale) {
  with_reducer(tile.wide, how, [&](auto math, auto reducer) {
    using Real = typename decltype(math)::Real;
    for (int64_t row = 0; row < tile.rows; ++row) {
      Real* z = row_of<Real>(tile, row);
      slopes(reducer, z, tile.columns, reals<Real>(value)[row], reals<Real>(scale)[row], z);
    }
  });
}

void second_sum(const Tile& z_tile, const Tile& t_tile, Reduce how, const void* value, double* u) {
  with_reducer(z_tile.wide, how, [&](auto math, auto reducer) {
    using Real = typename decltype(math)::Real;
    for (int64_t row = 0; row < z_tile.rows; ++row) {
      const Real* z = row_of<Real>(z_tile, row);
      const Real* t = row_of<Real>(t_tile, row);
      const Real v = reals<Real>(value)[row];
      for (int64_t at = 0; at < z_tile.columns; at += kBlock) {
        const int64_t end = at + block_size(z_tile.columns, at);
        Real part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t k = at; k < end; ++k) part += t[k] * reducer.slope(z[k], v);
        u[row] += double(part);
      }
    }
  });
}

void second(const Tile& z_tile, const Tile& t_tile, Reduce how, const void* value, const void* scale, const double* u) {
  with_reducer(z_tile.wide, how, [&](auto math, auto reducer) {
    using Real = typename decltype(math)::Real;
    for (int64_t row = 0; row < z_tile.rows; ++row) {
      Real* z = row_of<Real>(z_tile, row);
      Real* t = row_of<Real>(t_tile, row);
      const Real v = reals<Real>(value)[row], g = reals<Real>(scale)[row], sum = Real(u[row]);
#pragma omp simd
      for (int64_t k = 0; k < z_tile.columns; ++k) {
        t[k] = g * reducer.curvature(z[k], v, t[k], sum);
        z[k] = g * reducer.slope(z[k], v);
      }
    }
  });
}

void column_sums(const Tile& tile, double* sum) {
  with_math(tile.wide, [&](auto math) {
    using Real = typename decltype(math)::Real;
    alignas(64) Real part[kBlock];
    for (int64_t at = 0; at < tile.columns; at += kBlock) {
      const int64_t size = block_size(tile.columns, at);
      for (int64_t first = 0; first < tile.rows; first += kRowsOfBlock) {
        const int64_t last = first + kRowsOfBlock < tile.rows ? first + kRowsOfBlock : tile.rows;
        for (int64_t k = 0; k < size; ++k) part[k] = 0;
        for (int64_t row = first; row < last; ++row) {
          const Real* z = row_of<Real>(tile, row) + at;
#pragma omp simd
          for (int64_t k = 0; k < size; ++k) part[k] += z[k];
        }
        for (int64_t k = 0; k < size; ++k) sum[at + k] += double(part[k]);
      }
    }
  });
}

}  // namespace

void reduce(const Tile& tile, Reduce how, RowState* state) {
  with_reducer(tile.wide, how, [&](auto math, auto reducer) {
    using Real = typename decltype(math)::Real;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const Real* z = row_of<Real>(tile, row);
      for (int64_t at = 0; at < tile.columns; at += kBlock) {
        state[row] = merged(reducer, state[row], reduce_block(reducer, z + at, block_size(tile.columns, at)));
      }
    }
  });
}

void best(const Tile& tile, int64_t first_column, Best* best) {
  with_math(tile.wide, [&](auto math) {
    for (int64_t row = 0; row < tile.rows; ++row) best_of_row(math, tile, row, first_column, best + row);
  });
}

extern const TileEngine tile_engine;
const TileEngine tile_engine = {
    widen_row, narrow_row, square_sum, square_distance, remove_direction, affine, begin,       reduce,
    finish,    best,       scores,     slope,           second_sum,       second, column_sums, reduce_columns,
    positives, contrast,
};

}  // namespace oodkern::OODKERN_ISA
