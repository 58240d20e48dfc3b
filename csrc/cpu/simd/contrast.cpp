// The work on tiles that InfoNCE alone needs: logsumexp of columns, positives, and the derivative of both directions.
// Compiled once per instruction set.
#include "tile_rows.h"

namespace oodkern::OODKERN_ISA {

void reduce_columns(const Tile& tile, RowState* state) {
  with_math(tile.wide, [&](auto math) {
    using Math = decltype(math);
    using Real = typename Math::Real;
    using Reducer = LogSumExp<Math>;
    const Reducer reducer{1.0};
    alignas(64) Real maximum[kBlock], sum[kBlock];
    for (int64_t at = 0; at < tile.columns; at += kBlock) {
      const int64_t size = block_size(tile.columns, at);
      for (int64_t first = 0; first < tile.rows; first += kRowsOfBlock) {
        const int64_t last = first + kRowsOfBlock < tile.rows ? first + kRowsOfBlock : tile.rows;
        for (int64_t k = 0; k < size; ++k) maximum[k] = Reducer::init().maximum, sum[k] = 0;
        for (int64_t row = first; row < last; ++row) {
          const Real* z = row_of<Real>(tile, row) + at;
#pragma omp simd
          for (int64_t k = 0; k < size; ++k) maximum[k] = Reducer::pivot(z[k], maximum[k]);
        }
        for (int64_t row = first; row < last; ++row) {
          const Real* z = row_of<Real>(tile, row) + at;
#pragma omp simd
          for (int64_t k = 0; k < size; ++k) sum[k] += reducer.add(z[k], maximum[k]);
        }
        for (int64_t k = 0; k < size; ++k) {
          state[at + k] = merged(reducer, state[at + k], {maximum[k], double(sum[k])});
        }
      }
    }
  });
}

void positives(const Tile& tile, const Positives& which, bool by_column, double* sum) {
  with_math(tile.wide, [&](auto math) {
    using Real = typename decltype(math)::Real;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const Real* z = row_of<Real>(tile, row);
      if (which.target) {
        const int64_t k = which.target[row];
        if (k >= 0 && k < tile.columns) sum[by_column ? k : row] += double(z[k]);
        continue;
      }
      const int64_t own = which.row_label[row];
      const int64_t* label = which.column_label;
      if (by_column) {
#pragma omp simd
        for (int64_t k = 0; k < tile.columns; ++k) sum[k] += label[k] == own ? double(z[k]) : 0.0;
        continue;
      }
      double part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t k = 0; k < tile.columns; ++k) part += label[k] == own ? double(z[k]) : 0.0;
      sum[row] += part;
    }
  });
}

void contrast(const Tile& tile, const Contrast& c, double* product) {
  with_math(tile.wide, [&](auto math) {
    using Math = decltype(math);
    using Real = typename Math::Real;
    const LogSumExp<Math> reducer{1.0};
    const Real* b = reals<Real>(c.column_scale);
    const Real* column_lse = reals<Real>(c.column_lse);
    const Real* column_positive = reals<Real>(c.column_positive);
    alignas(64) Real grad[kBlock];
    for (int64_t row = 0; row < tile.rows; ++row) {
      Real* z_row = row_of<Real>(tile, row);
      const Real a = reals<Real>(c.row_scale)[row], lse = reals<Real>(c.row_lse)[row];
      const Real taken = reals<Real>(c.row_positive)[row];
      double total = 0;
      for (int64_t at = 0; at < tile.columns; at += kBlock) {
        const int64_t size = block_size(tile.columns, at);
        Real* z = z_row + at;
        slopes(reducer, z, size, lse, a, grad);
        if (b) {
#pragma omp simd
          for (int64_t k = 0; k < size; ++k) grad[k] += b[at + k] * reducer.slope(z[k], column_lse[at + k]);
        }
        if (c.positives.target) {
          const int64_t k = c.positives.target[row] - at;
          if (k >= 0 && k < size) grad[k] -= taken;
        } else {
          const int64_t own = c.positives.row_label[row];
          const int64_t* label = c.positives.column_label + at;
#pragma omp simd
          for (int64_t k = 0; k < size; ++k) grad[k] -= label[k] == own ? taken : Real(0);
          if (b) {
#pragma omp simd
            for (int64_t k = 0; k < size; ++k) grad[k] -= label[k] == own ? column_positive[at + k] : Real(0);
          }
        }
        double part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t k = 0; k < size; ++k) part += double(grad[k]) * double(z[k]);
        total += part;
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) z[k] = grad[k];
      }
      product[row] += total;
    }
  });
}

}  // namespace oodkern::OODKERN_ISA
