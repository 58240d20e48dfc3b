// Matrices and columns of numbers as products and the work on tiles read them.
#pragma once

#include <vector>

#include "../stable.h"
#include "blas.h"
#include "dispatch.h"

namespace oodkern {

// What products are computed in: as stored where they can be, in float32 elsewhere.
inline Storage product_storage(Storage stored) {
  if (stored == Storage::kFloat64) return stored;
  return stored == Storage::kBFloat16 && has_bfloat16_products() ? stored : Storage::kFloat32;
}
// Of matrices that may differ in it: float32 beside 16 bits, and nothing is rounded.
inline Storage product_storage(Storage a, Storage b) {
  return a == b ? product_storage(a) : Storage::kFloat32;
}
inline int64_t bytes_of(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}

// A matrix [N, D], read some rows at a time: in place where the BLAS can, through a buffer elsewhere.
class Operand {
 public:
  Operand(const Tensor& tensor, Storage read);
  int64_t rows() const { return rows_.rows; }
  int64_t columns() const { return rows_.columns; }
  Storage stored() const { return stored_; }
  Storage read() const { return read_; }
  bool in_place() const { return in_place_; }
  const void* row(int64_t i) const;
  // Rows [begin, begin + count) for the BLAS. A buffer holds them already where `copied`.
  Matrix block(int64_t begin, int64_t count, void* buffer, bool copied = false) const;

 private:
  Rows rows_;
  Storage stored_, read_;
  bool in_place_;
};

// 1 / |row|, 0 for a row of zeros.
double inverse_norm(const Operand& operand, int64_t row);
// factor / |row| of rows [first, first + count), as Real; 0 for a row of zeros.
std::vector<char> inverse_norms(const Operand& operand, int64_t first, int64_t count, double factor);

// Numbers as Real; those of rows [first, first + count) of a column, times a factor.
template <class Number>
std::vector<char> reals(bool wide, int64_t count, Number&& number) {
  std::vector<char> out(count * (wide ? 8 : 4));
  for (int64_t i = 0; i < count; ++i) {
    put_real(wide, out.data(), i, number(i));
  }
  return out;
}
std::vector<char> reals_of(bool wide, const Column& column, int64_t first, int64_t count, double factor);

}  // namespace oodkern
