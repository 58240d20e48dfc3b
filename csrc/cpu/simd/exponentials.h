// Exponentials of a block of numbers that are read: their sum, or each of them. Loops over scalars, and by AVX-512's
// own instructions for them, of which GCC knows none: VREDUCEPS is the rest of a rounding, VSCALEFPS multiplies by a
// power of two up to infinity, and both are right at infinities and NaNs. Beside GCC 12's code for the loop over
// scalars, whose clamps are comparisons and masks there, a sum takes half the time.
#pragma once

#include "../../reduce.h"
#include "math.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace oodkern::OODKERN_ISA {

// Whether there are vector versions of what is done in this arithmetic.
template <class Math>
constexpr bool kVectors = false;

#if defined(__AVX512F__)
template <>
constexpr bool kVectors<Float> = true;

// With all lanes named: GCC 12 warns of uninitialised lanes in its own header otherwise.
constexpr __mmask16 kAllLanes = 0xffff;

OODKERN_INLINE __m512 load(const float* from, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}
OODKERN_INLINE __m512 load(const BFloat16* from, __mmask16 lanes) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAllLanes, _mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, wide, 16));
}

// Float::exp2, 16 at a time, and like it 0 where x rounds to -127 or less; VSCALEFPS alone goes on to subnormal
// numbers, which a sum that holds a 1 may keep.
template <bool subnormal>
OODKERN_INLINE __m512 exp2(__m512 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 n = _mm512_maskz_roundscale_ps(kAllLanes, x, kNearest);
  const __m512 r = _mm512_maskz_reduce_ps(kAllLanes, x, kNearest);
  __m512 q = _mm512_set1_ps(Float::kExp2[0]);
  for (int i = 1; i < 5; ++i) q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(Float::kExp2[i]));
  q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f));
  // "Not less or equal" holds of NaNs, which stay.
  const __mmask16 kept = subnormal ? kAllLanes : _mm512_cmp_ps_mask(n, _mm512_set1_ps(-127.0f), _CMP_NLE_UQ);
  return _mm512_maskz_scalef_ps(kept, q, n);
}
template <bool subnormal>
struct Exponential {
  __m512 shift, scale;
  Exponential(float shift, float scale) : shift(_mm512_set1_ps(shift)), scale(_mm512_set1_ps(scale)) {}
  OODKERN_INLINE __m512 operator()(__m512 z) const {
    return exp2<subnormal>(_mm512_mul_ps(_mm512_sub_ps(z, shift), scale));
  }
};

OODKERN_INLINE float sum_of(__m512 numbers) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, numbers);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < 16; ++k) sum += lanes[k];
  return sum;
}

// body(k, lanes, which) for 16 numbers from k on, with two running sums for the two of a turn.
template <class Body>
OODKERN_INLINE void by_sixteen(int64_t size, Body&& body) {
  int64_t k = 0;
  for (; k + 32 <= size; k += 32) body(k, kAllLanes, 0), body(k + 16, kAllLanes, 1);
  for (; k < size; k += 16) body(k, size - k < 16 ? __mmask16((1u << (size - k)) - 1) : kAllLanes, 0);
}
#endif

// max_k z_k; a NaN is passed over.
template <class Math, class Stored>
OODKERN_INLINE typename Math::Real largest(const Stored* z, int64_t size) {
  using Real = typename Math::Real;
  using Reducer = LogSumExp<Math>;
#if defined(__AVX512F__)
  if constexpr (kVectors<Math>) {
    __m512 most[2] = {_mm512_set1_ps(-Math::infinity()), _mm512_set1_ps(-Math::infinity())};
    by_sixteen(size, [&](int64_t k, __mmask16 lanes, int which) __attribute__((always_inline)) {
      most[which] = _mm512_mask_max_ps(most[which], lanes, load(z + k, lanes), most[which]);
    });
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, _mm512_maskz_max_ps(kAllLanes, most[0], most[1]));
    Real found = Reducer::init().maximum;
    for (const Real one : lanes) found = Reducer::pivot(one, found);
    return found;
  }
#endif
  Real most = Reducer::init().maximum;
#pragma omp simd reduction(max : most)
  for (int64_t k = 0; k < size; ++k) most = Reducer::pivot(load(z[k]), most);
  return most;
}

// sum_k 2^((z_k - shift) scale)
template <class Math, class Stored>
OODKERN_INLINE typename Math::Real sum_of_exponentials(const Stored* z, int64_t size, typename Math::Real shift,
                                                       typename Math::Real scale) {
  using Real = typename Math::Real;
#if defined(__AVX512F__)
  if constexpr (kVectors<Math>) {
    const Exponential<true> exponential(shift, scale);
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    by_sixteen(size, [&](int64_t k, __mmask16 lanes, int which) __attribute__((always_inline)) {
      sum[which] = _mm512_mask_add_ps(sum[which], lanes, sum[which], exponential(load(z + k, lanes)));
    });
    return sum_of(_mm512_add_ps(sum[0], sum[1]));
  }
#endif
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < size; ++k) sum += Math::exp2((load(z[k]) - shift) * scale);
  return sum;
}

// out_k = factor 2^((z_k - shift) scale), out maybe z; returns the sum of out_k.
template <class Math>
OODKERN_INLINE typename Math::Real exponentials(const typename Math::Real* z, int64_t size, typename Math::Real shift,
                                                typename Math::Real scale, typename Math::Real factor,
                                                typename Math::Real* out) {
  using Real = typename Math::Real;
#if defined(__AVX512F__)
  if constexpr (kVectors<Math>) {
    const Exponential<false> exponential(shift, scale);
    const __m512 by = _mm512_set1_ps(factor);
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    by_sixteen(size, [&](int64_t k, __mmask16 lanes, int which) __attribute__((always_inline)) {
      const __m512 one = _mm512_mul_ps(by, exponential(load(z + k, lanes)));
      _mm512_mask_storeu_ps(out + k, lanes, one);
      sum[which] = _mm512_mask_add_ps(sum[which], lanes, sum[which], one);
    });
    return sum_of(_mm512_add_ps(sum[0], sum[1]));
  }
#endif
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < size; ++k) {
    out[k] = factor * Math::exp2((z[k] - shift) * scale);
    sum += out[k];
  }
  return sum;
}

// out_k = factor slope(z_k, value) of a reducer, out maybe z.
template <class Reducer>
OODKERN_INLINE void slopes(const Reducer& reducer, const typename Reducer::Real* z, int64_t size,
                           typename Reducer::Real value, typename Reducer::Real factor, typename Reducer::Real* out) {
  using Math = typename Reducer::Arithmetic;
  if constexpr (Reducer::kPivot) {
    if (value != -Math::infinity()) {
      exponentials<Math>(z, size, value, reducer.scale, factor, out);
      return;
    }
  }
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) out[k] = factor * reducer.slope(z[k], value);
}

}  // namespace oodkern::OODKERN_ISA
