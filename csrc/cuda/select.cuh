// What the kernels of room `select` share: scores as integers, which order them as the room does.
#pragma once

#include "atomics.cuh"

namespace oodkern::device {

// An int64 as atomics take it: sums are the same.
__device__ __forceinline__ uint64_t* as_unsigned(int64_t* word) {
  return reinterpret_cast<uint64_t*>(word);
}

template <class Real>
using OrderedBits = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;

// Larger where x is larger, equal for both zeros; never 0, nor is its complement, for what is no NaN.
template <class Real>
__device__ __forceinline__ OrderedBits<Real> ordered(Real x) {
  using Bits = OrderedBits<Real>;
  x += Real(0);  // -0 becomes 0
  Bits bits;
  memcpy(&bits, &x, sizeof(x));
  constexpr Bits kTop = Bits(1) << (8 * sizeof(Bits) - 1);
  return bits & kTop ? Bits(~bits) : Bits(bits | kTop);
}

}  // namespace oodkern::device
