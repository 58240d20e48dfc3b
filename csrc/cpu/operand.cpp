#include "operand.h"

#include <cmath>
#include <cstring>

namespace oodkern {

Operand::Operand(const Tensor& tensor, Storage read)
    : rows_(as_rows(tensor)), stored_(storage_of(tensor)), read_(read) {
  if (rows_.rows == 1) rows_.stride = rows_.columns;  // whatever it was
  // BLAS takes 32-bit strides, and rows that do not overlap.
  in_place_ = stored_ == read_ && rows_.stride >= rows_.columns && rows_.stride < (int64_t(1) << 31);
}

const void* Operand::row(int64_t i) const {
  return static_cast<const char*>(rows_.data()) + i * rows_.stride * bytes_of(stored_);
}

Matrix Operand::block(int64_t begin, int64_t count, void* buffer, bool copied) const {
  const int64_t D = rows_.columns;
  if (in_place_) return {row(begin), std::max<int64_t>(rows_.stride, 1)};
  for (int64_t i = 0; i < count && !copied; ++i) {
    void* target = static_cast<char*>(buffer) + i * D * bytes_of(read_);
    if (stored_ == read_) {
      std::memcpy(target, row(begin + i), D * bytes_of(read_));
    } else {
      tile_engine().widen(stored_, row(begin + i), D, target);
    }
  }
  return {buffer, std::max<int64_t>(D, 1)};
}

double inverse_norm(const Operand& operand, int64_t row) {
  const double square = tile_engine().square_sum(operand.stored(), operand.row(row), operand.columns());
  return square == 0 ? 0.0 : 1 / std::sqrt(square);
}

std::vector<char> inverse_norms(const Operand& operand, int64_t first, int64_t count, double factor) {
  return reals(operand.read() == Storage::kFloat64, count, [&](int64_t i) {
    const double square = tile_engine().square_sum(operand.stored(), operand.row(first + i), operand.columns());
    return square == 0 ? 0.0 : factor / std::sqrt(square);
  });
}

std::vector<char> reals_of(bool wide, const Column& column, int64_t first, int64_t count, double factor) {
  return reals(wide, count,
               [&](int64_t i) { return factor * real_of(wide, column.data(), (first + i) * column.stride); });
}

}  // namespace oodkern
