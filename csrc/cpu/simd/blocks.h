// Blocks of a row that stay in the first-level cache: widened, reduced, rounded.
#pragma once

#include "../../reduce.h"
#include "../rows.h"
#include "exponentials.h"
#include "math.h"

namespace oodkern::OODKERN_ISA {

// 1,024 floats: 4 KiB, so a block, its cotangent and their widened copies share a 32 KiB cache.
constexpr int64_t kBlock = 1024;

// A block widened to Real: in place where the storage is Real already, through `buffer` otherwise.
template <class Real>
OODKERN_INLINE const Real* widen(const Real* block, int64_t, Real*) {
  return block;
}
template <class Stored, class Real>
OODKERN_INLINE const Real* widen(const Stored* block, int64_t size, Real* buffer) {
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) buffer[k] = load(block[k]);
  return buffer;
}

// Where a block of results is formed, and how it reaches memory. Two loops vectorise where one that
// computes and rounds does not (GCC 12, float16 double backward of 65,536 x 1,000: 171 against 43 ms).
template <class Real>
OODKERN_INLINE Real* target(Real* block, Real*) {
  return block;
}
template <class Stored, class Real>
OODKERN_INLINE Real* target(Stored*, Real* buffer) {
  return buffer;
}
template <class Real>
OODKERN_INLINE void narrow(const Real*, int64_t, Real*) {}
template <class Stored, class Real>
OODKERN_INLINE void narrow(const Real* buffer, int64_t size, Stored* block) {
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) store(block + k, buffer[k]);
}

#if defined(__AVX512F__)
// One instruction each where load and store take a dozen, which is what float16 rows wait for.
OODKERN_INLINE const float* widen(const Float16* block, int64_t size, float* buffer) {
  int64_t k = 0;
  for (; k + 16 <= size; k += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + k));
    _mm512_storeu_ps(buffer + k, _mm512_maskz_cvtph_ps(kAllLanes, halves));
  }
  for (; k < size; ++k) buffer[k] = load(block[k]);
  return buffer;
}
OODKERN_INLINE void narrow(const float* buffer, int64_t size, Float16* block) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t k = 0;
  for (; k + 16 <= size; k += 16) {
    const __m256i halves = _mm512_maskz_cvtps_ph(kAllLanes, _mm512_loadu_ps(buffer + k), kNearest);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block + k), halves);
  }
  for (; k < size; ++k) store(block + k, buffer[k]);
}
#endif

// A block of a row as Real, whatever its storage: two tensors of different storages cost a
// branch a block, and no code of their own.
template <class Real>
OODKERN_INLINE const Real* read(Storage storage, const void* row, int64_t at, int64_t size, Real* buffer) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    return static_cast<const Real*>(row) + at;
  } else {
    switch (storage) {
      case Storage::kBFloat16: return widen(static_cast<const BFloat16*>(row) + at, size, buffer);
      case Storage::kFloat16: return widen(static_cast<const Float16*>(row) + at, size, buffer);
      default: return static_cast<const Real*>(row) + at;
    }
  }
}

OODKERN_INLINE const void* row_at(const void* rows, Storage storage, int64_t elements) {
  const int64_t size = storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
  return static_cast<const char*>(rows) + elements * size;
}

// Widening twice, once for the pivot and once for the sum, costs less than a round trip through a
// buffer for bfloat16 (a shift; 12.9 against 14.4 ms for 65,536 x 1,000) and more for float16.
template <class Stored>
constexpr bool kCostlyLoad = false;
template <>
constexpr bool kCostlyLoad<Float16> = true;

template <class Reducer, class Stored>
OODKERN_INLINE typename Reducer::State reduce_block(const Reducer& reducer, const Stored* z, int64_t size) {
  using Real = typename Reducer::Real;
  using Math = typename Reducer::Arithmetic;
  if constexpr (Reducer::kPivot) {
    const Real pivot = largest<Math>(z, size);
    return {pivot, sum_of_exponentials<Math>(z, size, Reducer::finite(pivot), reducer.scale)};
  } else {
    const Real pivot = Reducer::init().maximum;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < size; ++k) sum += reducer.add(load(z[k]), pivot);
    return {pivot, sum};
  }
}

// Memory of one thread for as long as it works on rows. (Not a std::vector: see math.h on inline functions.)
template <class Real>
struct Scratch {
  Real* data;
  explicit Scratch(int64_t size) : data(new Real[size]) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { delete[] data; }
};

// The same of a block that is widened already, for LogSumExp: its exponentials stay in `kept`, and the shares are made
// of them. exp((z_k - M) / T) of the row's maximum M is kept_k exp((m - M) / T) of the block's maximum m.
template <class Math>
OODKERN_INLINE typename LogSumExp<Math>::State keep_block(const LogSumExp<Math>& reducer, const typename Math::Real* z,
                                                          int64_t size, typename Math::Real* kept) {
  const auto pivot = largest<Math>(z, size);
  return {pivot, exponentials<Math>(z, size, LogSumExp<Math>::finite(pivot), reducer.scale, 1, kept)};
}
// What makes shares of a block's kept exponentials.
template <class Math>
OODKERN_INLINE typename Math::Real share_of(const LogSumExp<Math>& reducer, typename Math::Real pivot,
                                            Softmax<Math> softmax) {
  return reducer.add(pivot, softmax.maximum) * softmax.reciprocal;  // 0 for a block of -inf alone
}

}  // namespace oodkern::OODKERN_ISA
