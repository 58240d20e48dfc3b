// Atomics on integers, of which any order gives the same sum and the same largest; floating ones are not offered,
// since they do not. What nobody else stores to may be read plainly behind a barrier; beside atomics it is read
// with `relaxed`.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace oodkern::device {

#if defined(__CUDACC__)
template <class T>
struct AtomicWord {
  using Type = unsigned;
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
};
template <>
struct AtomicWord<uint64_t> {
  using Type = unsigned long long;  // what CUDA's atomics take
};
template <class T>
__device__ __forceinline__ T relaxed(const T* address) {
  return *static_cast<const volatile T*>(address);
}
template <class T>
__device__ __forceinline__ void atomic_largest(T* address, T value) {
  using Type = typename AtomicWord<T>::Type;
  atomicMax(reinterpret_cast<Type*>(address), Type(value));
}
// Gives what was there before.
template <class T>
__device__ __forceinline__ T atomic_sum(T* address, T value) {
  using Type = typename AtomicWord<T>::Type;
  return T(atomicAdd(reinterpret_cast<Type*>(address), Type(value)));
}
template <class T>
__device__ __forceinline__ T relaxed(const SharedArray<T>& words, int i) {
  return relaxed(words.words + i);
}
template <class T>
__device__ __forceinline__ void atomic_largest(const SharedArray<T>& words, int i, T value) {
  atomic_largest(words.words + i, value);
}
template <class T>
__device__ __forceinline__ T atomic_sum(const SharedArray<T>& words, int i, T value) {
  return atomic_sum(words.words + i, value);
}
#else
using emulator::atomic_largest;
using emulator::atomic_sum;
using emulator::relaxed;
#endif

}  // namespace oodkern::device
