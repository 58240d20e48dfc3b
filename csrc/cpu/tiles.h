// What is done to a tile of products while it is in cache. Plain pointers and sizes, compiled once per instruction
// set as the row engine is. `Real` is double where `wide`, float elsewhere.
#pragma once

#include "rows.h"

namespace oodkern {

// Element i of numbers that are Real.
inline double real_of(bool wide, const void* data, int64_t i) {
  return wide ? static_cast<const double*>(data)[i] : double(static_cast<const float*>(data)[i]);
}
inline void put_real(bool wide, void* data, int64_t i, double value) {
  wide ? void(static_cast<double*>(data)[i] = value) : void(static_cast<float*>(data)[i] = float(value));
}

// Rows of a tile: z [rows, columns] Real, `stride` apart.
struct Tile {
  bool wide;
  int64_t rows;
  int64_t columns;
  void* z;
  int64_t stride;
};

// A reduction: which, and of LogSumExp its temperature.
struct Reduce {
  Reduction reduction;
  double temperature;
};

// What a partly read row has come to; `maximum` of LogSumExp alone.
struct RowState {
  double maximum;
  double sum;
};

// The place of the largest element of a partly read row.
struct Best {
  double maximum;
  int64_t index;  // -1 before the first
};

// Positives of InfoNCE within a tile: by place, or by label where there are labels.
struct Positives {
  const int64_t* target;        // [rows] column in the tile, or outside of it
  const int64_t* row_label;     // [rows]
  const int64_t* column_label;  // [columns]
};

// The derivative of InfoNCE: a_i (P_ij - [positive] a_positive_i) + the same of columns.
struct Contrast {
  Positives positives;
  const void* row_scale;        // a [rows] Real
  const void* row_lse;          // [rows] Real
  const void* row_positive;     // [rows] Real: what a positive takes away
  const void* column_scale;     // b [columns] Real, or null
  const void* column_lse;       // [columns] Real
  const void* column_positive;  // [columns] Real, of labels alone
};

struct TileEngine {
  void (*widen)(Storage from, const void* source, int64_t count, void* target);  // to Real of the storage
  void (*narrow)(Storage to, const void* source, int64_t count, void* target);   // from Real of the storage
  double (*square_sum)(Storage, const void* row, int64_t count);
  // |scale a - b|^2, with b stored as a or as its Real
  double (*square_distance)(Storage of_a, const void* a, double scale, Storage of_b, const void* b, int64_t count);
  // row -= scale (row . direction) direction
  void (*remove)(bool wide, void* row, const void* direction, int64_t count, double scale);

  // z <- z row_scale column_scale + bias, each [rows] or [columns] Real or null
  void (*affine)(const Tile&, const void* row_scale, const void* column_scale, const void* bias);
  void (*begin)(Reduce, int64_t rows, RowState* state);
  void (*reduce)(const Tile&, Reduce, RowState* state);
  // out [rows] Real <- sign * value
  void (*finish)(bool wide, Reduce, int64_t rows, const RowState* state, double sign, void* out);
  void (*best)(const Tile&, int64_t first_column, Best* best);
  // What reduce does of LogSumExp at temperature 1 and of SoftplusSum, and best, in one go. Of rows of float it reads
  // (and does not use) up to 15 numbers behind the last column.
  void (*scores)(const Tile&, int64_t first_column, RowState* lse, RowState* softplus, Best* best);
  // z <- scale slope(z, value), with value and scale [rows] Real
  void (*slope)(const Tile&, Reduce, const void* value, const void* scale);
  // u += sum_k t_k slope_k
  void (*second_sum)(const Tile& z, const Tile& t, Reduce, const void* value, double* u);
  // t <- scale curvature(z, value, t, u), z <- scale slope(z, value)
  void (*second)(const Tile& z, const Tile& t, Reduce, const void* value, const void* scale, const double* u);
  // sum [columns] += column sums
  void (*column_sums)(const Tile&, double* sum);
  // The logsumexp of columns, as reduce with one state a column.
  void (*reduce_columns)(const Tile&, RowState* state);
  // Of each row, the sum of its positives, added to sum [rows]; with `by_column` of each column, to sum [columns].
  void (*positives)(const Tile&, const Positives&, bool by_column, double* sum);
  // z <- derivative; product [rows] += sum_k derivative_k z_k
  void (*contrast)(const Tile&, const Contrast&, double* product);
};

}  // namespace oodkern
