// The words of CUDA that kernels are written in, said by the emulator.
#pragma once

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace emulator {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// What lane `source` gave; a lane that the mask leaves out gave nothing.
template <class T>
T exchange(const char* operation, uint32_t mask, T value, unsigned source, const char* file, int line) {
  Thread& self = *current->running;
  self.given = to_bits(value);
  current->meet({operation, file, line, mask, false});
  if (!(mask >> source & 1))
    current->fail(std::string(operation) + " reads lane " + std::to_string(source) + ", which the mask leaves out");
  return from_bits<T>(self.taken[source]);
}
inline unsigned lane() {
  return current->running->lane();
}
inline unsigned segment_end(int width) {
  return (lane() / unsigned(width) + 1) * unsigned(width);
}

}  // namespace emulator

#define OODKERN_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define threadIdx (emulator::Index{emulator::current->running->index, 0, 0})
#define blockIdx (emulator::current->index)
#define gridDim (emulator::current->grid)
#define blockDim (emulator::Index{emulator::current->size, 1, 1})

inline void __syncthreads(OODKERN_HERE) {
  emulator::current->meet({"__syncthreads", file, line, 0, true});
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, OODKERN_HERE) {
  emulator::current->meet({"__syncwarp", file, line, mask, false});
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, OODKERN_HERE) {
  const unsigned first = emulator::segment_end(width) - unsigned(width);
  return emulator::exchange("__shfl_sync", mask, value, first + unsigned(source) % unsigned(width), file, line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, OODKERN_HERE) {
  const unsigned other = emulator::lane() ^ unsigned(bits);
  const unsigned source = other < emulator::segment_end(width) ? other : emulator::lane();
  return emulator::exchange("__shfl_xor_sync", mask, value, source, file, line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, OODKERN_HERE) {
  const unsigned other = emulator::lane() + delta;
  const unsigned source = other < emulator::segment_end(width) ? other : emulator::lane();
  return emulator::exchange("__shfl_down_sync", mask, value, source, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, OODKERN_HERE) {
  emulator::exchange("__ballot_sync", mask, uint32_t(predicate != 0), emulator::lane(), file, line);
  uint32_t ballot = 0;
  for (unsigned i = 0; i < emulator::kWarp; ++i) {
    if (mask >> i & 1) ballot |= uint32_t(emulator::current->running->taken[i] & 1) << i;
  }
  return ballot;
}
inline int __any_sync(uint32_t mask, int predicate, OODKERN_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, OODKERN_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
