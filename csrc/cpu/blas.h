// Products of small dense matrices, on the calling thread where it is one of a parallel region's.
#pragma once

#include "rows.h"

namespace oodkern {

// A matrix in memory: rows `stride` elements apart, stride >= columns.
struct Matrix {
  const void* data;
  int64_t stride;
};

// Whether products of bfloat16 matrices, accumulated in float32, are fast here: elsewhere they are widened first.
bool has_bfloat16_products();

// out [M, N] (+)= A B + bias, row by row in memory, with A [M, depth] ([depth, M] where transposed) and B [depth, N]
// ([N, depth]). `storage` is that of A and B: float64 gives float64, float32 and bfloat16 give float32.
struct Multiply {
  Storage storage;
  bool transpose_a;
  bool transpose_b;
  int64_t M, N, depth;
  Matrix a, b;
  void* out;
  int64_t out_stride;
  bool accumulate;
  const void* bias = nullptr;  // [N] as out, or none
};
void multiply(const Multiply& product);

using Product = void (*)(const Multiply&);
Product bfloat16_product_of_blas();  // null where it is slow or missing

}  // namespace oodkern
