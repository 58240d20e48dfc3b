// Scalar functions that GCC and Clang vectorise inside an `omp simd` loop: straight-line arithmetic,
// no table, no call. (Double calls libm: it serves gradcheck, not speed.) Everything lives in a namespace named after
// the instruction set, because an inline function that two instruction sets share is merged by the linker into either
// of its bodies.
//
// No -ffast-math here or anywhere: linked into a library it makes the whole process flush
// denormals, and it would drop the NaN and infinity handling that reduce.h relies on.
#pragma once

#include <cstdint>

namespace oodkern::OODKERN_ISA {

#define OODKERN_INLINE inline __attribute__((always_inline))

OODKERN_INLINE float as_float(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
OODKERN_INLINE uint32_t as_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

struct Double {
  using Real = double;
  using Sum = double;
  static OODKERN_INLINE Real infinity() { return __builtin_inf(); }
  static OODKERN_INLINE Real absolute(Real x) { return __builtin_fabs(x); }
  static OODKERN_INLINE Real exp_of_negative(Real x) { return __builtin_exp(x); }
  static OODKERN_INLINE Real exp(Real x) { return __builtin_exp(x); }
  static OODKERN_INLINE Real exp2(Real x) { return __builtin_exp2(x); }
  static OODKERN_INLINE Real log(Real x) { return __builtin_log(x); }
  static OODKERN_INLINE Real log1p_unit(Real x) { return __builtin_log1p(x); }
};

struct Float {
  using Real = float;
  using Sum = double;
  static OODKERN_INLINE Real infinity() { return __builtin_inff(); }
  static OODKERN_INLINE Real absolute(Real x) { return __builtin_fabsf(x); }
  static OODKERN_INLINE Sum log(Sum x) { return __builtin_log(x); }

  // 2^n and the rest of an exponential, from x already divided by ln 2. Adding 1.5 * 2^23 rounds to an
  // integer and leaves it in the low bits; with 127 more those bits, moved up, are the float 2^n, and
  // n = -127 gives exactly 0. Clamping to [-127, 128] therefore makes 0 of what is under about 2^-126,
  // the smallest normal number, and +inf of +inf, without a comparison of its own. A NaN passes both comparisons and
  // stays.
  static constexpr float kRound = 12582912.0f + 127.0f;
  static OODKERN_INLINE Real clamp(Real x) {
    const float above = x < -127.0f ? -127.0f : x;
    return above > 128.0f ? 128.0f : above;
  }
  static OODKERN_INLINE Real power_of_two(Real shifted) { return as_float(as_bits(shifted) << 23); }

  // 2^x = 2^n 2^r, |r| <= 1/2; 2^r - 1 = r q(r), a minimax fit with relative error 9.2e-8.
  static constexpr float kExp2[5] = {1.32646640e-03f, 9.67152705e-03f, 5.55073432e-02f, 2.40222420e-01f,
                                     6.93146983e-01f};
  static OODKERN_INLINE Real exp2(Real x) {
    const float clamped = clamp(x);
    const float shifted = clamped + kRound;
    const float r = clamped - (shifted - kRound);
    float q = kExp2[0];
    for (int i = 1; i < 5; ++i) q = q * r + kExp2[i];
    return (q * r + 1.0f) * power_of_two(shifted);
  }

  // exp(x) for x <= 0: 2^n exp(r), |r| <= ln(2) / 2; exp(r) = 1 + r + r^2 q(r), a minimax fit with
  // relative error 3.1e-9. ln 2 in two parts keeps r exact: for very negative logits softplus is
  // exp(-|z|) itself, and its relative error is all there is. -88 rounds to n = -127, that is to 0.
  static OODKERN_INLINE Real exp_of_negative(Real x) { return exp_of_clamped(x < -88.0f ? -88.0f : x); }
  // Of either sign: 89 rounds to n = 128, that is to +inf, and so does what is above 2^127.5.
  static OODKERN_INLINE Real exp(Real x) {
    const float above = x < -88.0f ? -88.0f : x;
    return exp_of_clamped(above > 89.0f ? 89.0f : above);
  }
  static OODKERN_INLINE Real exp_of_clamped(Real clamped) {
    const float shifted = clamped * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float q = 1.38146e-3f;
    q = q * r + 8.36872e-3f;
    q = q * r + 4.166839e-2f;
    q = q * r + 1.6666521e-1f;
    q = q * r + 4.9999993e-1f;
    return ((q * r * r + r) + 1.0f) * power_of_two(shifted);
  }

  // log(1 + x) for x in [0, 1]: 2 atanh(s) with s = x / (2 + x) in [0, 1/3], as 2 s (1 + s^2 q(s^2)).
  // Minimax fit with relative error 4.5e-9, down to the smallest x.
  static OODKERN_INLINE Real log1p_unit(Real x) {
    const float s = x / (2.0f + x);
    const float s2 = s * s;
    float q = 1.4006333e-1f;
    q = q * s2 + 1.4000839e-1f;
    q = q * s2 + 2.0010767e-1f;
    q = q * s2 + 3.3333208e-1f;
    return 2.0f * (s + s * s2 * q);
  }
};

// Storage types: what lies in memory, and the Math in which it is computed.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

OODKERN_INLINE double load(double x) {
  return x;
}
OODKERN_INLINE float load(float x) {
  return x;
}
OODKERN_INLINE float load(BFloat16 x) {
  return as_float(uint32_t(x.bits) << 16);
}
// A half's exponent and mantissa, moved to a float's place, read 2^-112 times the value, subnormals
// included; the multiplication puts that right. Infinity and NaN (exponent 31) get exponent 255.
OODKERN_INLINE float load(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t finite_or_not = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : scaled;
  return as_float(finite_or_not | sign);
}

OODKERN_INLINE void store(double* out, double x) {
  *out = x;
}
OODKERN_INLINE void store(float* out, float x) {
  *out = x;
}
// Round to nearest, ties to even; a NaN keeps a mantissa bit.
OODKERN_INLINE void store(BFloat16* out, float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
// Normal halves: round the mantissa to 10 bits in integers, rebias the exponent by -112. Subnormal
// halves (below 2^-14): adding 0.5 aligns the value so that the float's own rounding leaves the
// half's mantissa in the low bits. 65520 and above round to infinity.
OODKERN_INLINE void store(Float16* out, float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = uint16_t((magnitude >= 0x477ff000u ? overflow : finite) | sign);
}

}  // namespace oodkern::OODKERN_ISA
