// The work on pieces of rows whose norm is taken. Compiled once per instruction set.
#include "../norm.h"

#include "tile_rows.h"

namespace oodkern::OODKERN_ISA {
namespace {

// Sums term(k) of a piece in double. One running sum waits for its own last addition, 4 cycles a vector; kSums side by
// side do not, and neighbours stay neighbours, as the processor's prefetching wants it.
constexpr int64_t kSums = 32;

template <class Term>
OODKERN_INLINE double sum(int64_t count, Term&& term) {
  alignas(64) double sums[kSums] = {};
  const int64_t whole = count - count % kSums;
  for (int64_t at = 0; at < whole; at += kSums) {
#pragma omp simd
    for (int64_t k = 0; k < kSums; ++k) sums[k] += term(at + k);
  }
  double total = 0;
  for (int64_t k = 0; k < kSums; ++k) total += sums[k];
  for (int64_t k = whole; k < count; ++k) total += term(k);
  return total;
}

// Squares of 16-bit numbers are exact in float, and kRun of them are added up there before they are widened: 64 rows of
// 150,528 bfloat16 take 0.35 ms on 2 cores instead of 0.73. Those of bfloat16 can leave the range: see square_sum.
template <class Stored>
OODKERN_INLINE double sum_of_squares(const Stored* x, int64_t count) {
  constexpr int64_t kRun = 4;
  constexpr int64_t kStep = kRun * kSums;
  alignas(64) double sums[kSums] = {};
  const int64_t whole = count - count % kStep;
  for (int64_t at = 0; at < whole; at += kStep) {
#pragma omp simd
    for (int64_t k = 0; k < kSums; ++k) {
      float run = 0;
      for (int64_t i = 0; i < kRun; ++i) {
        const float value = load(x[at + i * kSums + k]);
        run += value * value;
      }
      sums[k] += double(run);
    }
  }
  double total = 0;
  for (int64_t k = 0; k < kSums; ++k) total += sums[k];
  for (int64_t k = whole; k < count; ++k) total += double(load(x[k])) * double(load(x[k]));
  return total;
}

double square_sum(Storage storage, const void* x_row, int64_t count, double scale) {
  double total = 0;
  with_storage(storage, [&](auto stored, auto) {
    using Stored = decltype(stored);
    const auto* x = static_cast<const Stored*>(x_row);
    if constexpr (sizeof(Stored) == 2) {
      total = sum_of_squares(x, count);
      // Of what is lost below float's smallest number, 2^-149 a square, 2^20 squares do not make a bit of this.
      if (scale == 1 && total >= 0x1p-96 && total < __builtin_inf()) return;
    }
    total = sum(count, [=](int64_t k) __attribute__((always_inline)) {
      const double scaled = scale * double(load(x[k]));
      return scaled * scaled;
    });
  });
  return total;
}

double dot(Storage storage, const void* x_row, const void* t_row, int64_t count, double inverse) {
  double total = 0;
  with_storage(storage, [&](auto stored, auto) {
    const auto* x = static_cast<const decltype(stored)*>(x_row);
    const auto* t = static_cast<const decltype(stored)*>(t_row);
    total = sum(count, [=](int64_t k) __attribute__((always_inline)) {
      return double(load(t[k])) * (inverse * double(load(x[k])));
    });
  });
  return total;
}

double largest(Storage storage, const void* x_row, int64_t count) {
  double most = 0;
  with_storage(storage, [&](auto stored, auto) {
    const auto* x = static_cast<const decltype(stored)*>(x_row);
#pragma omp simd reduction(max : most)
    for (int64_t k = 0; k < count; ++k) {
      const double size = __builtin_fabs(double(load(x[k])));
      most = size > most ? size : most;
    }
  });
  return most;
}

// out_k = Real(term(k)), block by block, so that computing and rounding to 16 bits vectorise each for itself.
template <class Stored, class Real, class Term>
OODKERN_INLINE void write(int64_t count, Stored* out, Real*, Term&& term) {
  alignas(64) Real buffer[kBlock];
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t size = block_size(count, at);
    Real* block = target(out + at, buffer);
#pragma omp simd
    for (int64_t k = 0; k < size; ++k) block[k] = Real(term(at + k));
    narrow(block, size, out + at);
  }
}

void scaled(Storage storage, const void* x_row, int64_t count, double inverse, double scale, void* out) {
  with_storage(storage, [&](auto stored, auto real) {
    const auto* x = static_cast<const decltype(stored)*>(x_row);
    write(count, static_cast<decltype(stored)*>(out), &real,
          [=](int64_t k) __attribute__((always_inline)) { return scale * (inverse * double(load(x[k]))); });
  });
}

void projected(Storage storage, const void* x_row, const void* t_row, int64_t count, double inverse, double along,
               double scale, void* out) {
  with_storage(storage, [&](auto stored, auto real) {
    const auto* x = static_cast<const decltype(stored)*>(x_row);
    const auto* t = static_cast<const decltype(stored)*>(t_row);
    write(count, static_cast<decltype(stored)*>(out), &real, [=](int64_t k) __attribute__((always_inline)) {
      return scale * (double(load(t[k])) - along * (inverse * double(load(x[k]))));
    });
  });
}

}  // namespace

extern const NormEngine norm_engine;
const NormEngine norm_engine = {square_sum, dot, largest, scaled, projected};

}  // namespace oodkern::OODKERN_ISA
