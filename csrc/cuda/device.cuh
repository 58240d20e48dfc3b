// What kernels need of their compiler. nvcc takes it from the CUDA runtime; g++, which runs the same kernels on the CPU
// in tests/emulator, from the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#define OODKERN_ISA emulated
#include "cpu/simd/math.h"
#include "memory.h"
#endif

#include "../reduce.h"

namespace oodkern::device {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

// Storage types: what lies in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Shared memory is read and written through load(i) and store(i, x), which the emulator checks for races.
// OODKERN_SHARED(T, name, count) declares an array; OODKERN_DYNAMIC_SHARED(T, name) the launch's.
#if defined(__CUDACC__)
template <class T>
struct SharedArray {
  T* words;
  __device__ __forceinline__ T load(int i) const { return words[i]; }
  __device__ __forceinline__ void store(int i, T value) const { words[i] = value; }
};
#define OODKERN_SHARED(T, name, count)           \
  __shared__ T name##_words[count];              \
  const ::oodkern::device::SharedArray<T> name { \
    name##_words                                 \
  }
#define OODKERN_DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) unsigned char dynamic_words[]; \
  const ::oodkern::device::SharedArray<T> name {                 \
    reinterpret_cast<T*>(dynamic_words)                          \
  }

__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ void narrow(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, Float16* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}
#else
#define OODKERN_SHARED(T, name, count)      \
  static const char name##_declaration = 0; \
  const emulator::SharedArray<T> name = emulator::shared_array<T>(&name##_declaration, count, false)
#define OODKERN_DYNAMIC_SHARED(T, name)     \
  static const char name##_declaration = 0; \
  const emulator::SharedArray<T> name =     \
      emulator::shared_array<T>(&name##_declaration, emulator::current->dynamic_bytes / sizeof(T), true)

inline float widen(BFloat16 x) {
  return emulated::load(emulated::BFloat16{x.bits});
}
inline float widen(Float16 x) {
  return emulated::load(emulated::Float16{x.bits});
}
inline void narrow(float x, BFloat16* out) {
  emulated::BFloat16 narrowed;
  emulated::store(&narrowed, x);
  out->bits = narrowed.bits;
}
inline void narrow(float x, Float16* out) {
  emulated::Float16 narrowed;
  emulated::store(&narrowed, x);
  out->bits = narrowed.bits;
}
#endif
__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ void narrow(float x, float* out) {
  *out = x;
}
__device__ __forceinline__ void narrow(double x, double* out) {
  *out = x;
}

template <class To, class From>
OODKERN_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// As many elements as one access of 16 bytes carries.
template <class Stored>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / int(sizeof(Stored));
  Stored elements[kWidth];
};
#if defined(__CUDACC__)
// Through intrinsics: of eight plain assignments of vectors nvcc 13.0 made seven into 28 stores of one float each.
template <class Stored>
__device__ __forceinline__ Vector<Stored> load_vector(const Stored* address) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(address));
  Vector<Stored> vector;
  memcpy(&vector, &words, 16);
  return vector;
}
template <class Stored>
__device__ __forceinline__ void store_vector(Stored* address, const Vector<Stored>& vector) {
  uint4 words;
  memcpy(&words, &vector, 16);
  __stwb(reinterpret_cast<uint4*>(address), words);
}
#else
template <class Stored>
Vector<Stored> load_vector(const Stored* address) {
  emulator::check_alignment(address, "a load");
  return *reinterpret_cast<const Vector<Stored>*>(address);
}
template <class Stored>
void store_vector(Stored* address, const Vector<Stored>& vector) {
  emulator::check_alignment(address, "a store");
  *reinterpret_cast<Vector<Stored>*>(address) = vector;
}
#endif

// kBytes of plain data, a power of 2, in words of 16 bytes or, where they are fewer, in one.
template <int kBytes>
__device__ __forceinline__ void load_words(const void* address, void* out) {
#if defined(__CUDACC__)
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 word = __ldg(static_cast<const uint4*>(address) + i);
      memcpy(static_cast<char*>(out) + 16 * i, &word, 16);
    }
  } else if constexpr (kBytes == 8) {
    const uint2 word = __ldg(static_cast<const uint2*>(address));
    memcpy(out, &word, 8);
  } else if constexpr (kBytes == 4) {
    const uint32_t word = __ldg(static_cast<const uint32_t*>(address));
    memcpy(out, &word, 4);
  } else {
    static_assert(kBytes == 2);
    const uint16_t word = __ldg(static_cast<const uint16_t*>(address));
    memcpy(out, &word, 2);
  }
#else
  emulator::check_alignment(address, "a load", kBytes < 16 ? kBytes : 16);
  std::memcpy(out, address, kBytes);
#endif
}

// The engine's side of reduce.h. A row's parts are few and of like size (a thread's, a warp's, a block's), so float32
// adds them up without losing digits, unlike the CPU's one sum after another.
struct Float {
  using Real = float;
  using Sum = float;
  static OODKERN_HOST_DEVICE Real infinity() { return INFINITY; }
  static OODKERN_HOST_DEVICE Real absolute(Real x) { return fabsf(x); }
  static OODKERN_HOST_DEVICE Real exp_of_negative(Real x) { return expf(x); }
  // The instruction alone, as exact as exp2f and three instructions shorter: it makes 0 of what is under 2^-126, as the
  // CPU's does.
  static OODKERN_HOST_DEVICE Real exp2(Real x) {
#if defined(__CUDA_ARCH__)
    Real y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    const Real y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
#endif
  }
  static OODKERN_HOST_DEVICE Real log(Real x) { return logf(x); }
  static OODKERN_HOST_DEVICE Real log1p_unit(Real x) { return log1pf(x); }
  static OODKERN_HOST_DEVICE Real larger(Real a, Real b) { return fmaxf(a, b); }  // of a number and a NaN the number
  static OODKERN_HOST_DEVICE Real root(Real x) { return sqrtf(x); }
  // The power of 2 at or below x >= 0, kept within [2^-126, 2^126], and its inverse.
  static OODKERN_HOST_DEVICE Real power(Real x) { return bit_cast<Real>(exponent(x)); }
  static OODKERN_HOST_DEVICE Real inverse_power(Real x) { return bit_cast<Real>((254u << 23) - exponent(x)); }
  static OODKERN_HOST_DEVICE uint32_t exponent(Real x) {
    constexpr uint32_t kLeast = 1u << 23, kMost = 253u << 23;
    const uint32_t bits = bit_cast<uint32_t>(x) & 0x7f800000u;
    return bits < kLeast ? kLeast : (bits > kMost ? kMost : bits);
  }
};
struct Double {
  using Real = double;
  using Sum = double;
  static OODKERN_HOST_DEVICE Real infinity() { return INFINITY; }
  static OODKERN_HOST_DEVICE Real absolute(Real x) { return fabs(x); }
  static OODKERN_HOST_DEVICE Real exp_of_negative(Real x) { return exp(x); }
  static OODKERN_HOST_DEVICE Real exp2(Real x) { return ::exp2(x); }
  static OODKERN_HOST_DEVICE Real log(Real x) { return ::log(x); }
  static OODKERN_HOST_DEVICE Real log1p_unit(Real x) { return log1p(x); }
  static OODKERN_HOST_DEVICE Real larger(Real a, Real b) { return fmax(a, b); }
  static OODKERN_HOST_DEVICE Real root(Real x) { return sqrt(x); }
  static OODKERN_HOST_DEVICE Real power(Real x) { return bit_cast<Real>(exponent(x)); }
  static OODKERN_HOST_DEVICE Real inverse_power(Real x) { return bit_cast<Real>((2046ull << 52) - exponent(x)); }
  static OODKERN_HOST_DEVICE uint64_t exponent(Real x) {
    constexpr uint64_t kLeast = 1ull << 52, kMost = 2045ull << 52;
    const uint64_t bits = bit_cast<uint64_t>(x) & 0x7ff0000000000000ull;
    return bits < kLeast ? kLeast : (bits > kMost ? kMost : bits);
  }
};

}  // namespace oodkern::device
