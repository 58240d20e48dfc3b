// Classes in the order in which the stream engine reads them, and what it makes of their products.
#pragma once

#include "stream.cuh"

namespace oodkern::device {

struct PackCall {
  Stream reduction;
  const void* weight;  // [classes, columns]
  int64_t weight_stride;
  int columns;
  int classes;
  int blocks;        // of 8 classes
  bool aligned;      // rows begin at multiples of 16 bytes
  const void* bias;  // [classes], or null
  int64_t bias_stride;
  Words* packed;     // [slabs, blocks, 32]
  float* constants;  // [2, 8 blocks]: factors, offsets
};

// A warp packs a class; zeros stand where there is none, and behind the last column. Factors are 1 / |w_k| for the
// alignment, offsets -|w_k|^2 / 2 for the nearest center (the largest x . c - |c|^2 / 2 is that of the smallest
// |x - c|^2), and biases else.
template <class Stored>
__global__ void __launch_bounds__(kThreads, 2) pack_classes(const PackCall call) {
  const int lane = int(threadIdx.x) % 32;
  const int vectors = (call.columns + kSlab - 1) / kSlab * 4;
  for (int k = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32; k < 8 * call.blocks; k += int(gridDim.x) * kWarps) {
    const bool real = k < call.classes;
    const Stored* row = static_cast<const Stored*>(call.weight) + (real ? k : 0) * call.weight_stride;
    float square = 0;
    for (int i = lane; i < vectors; i += 32) {
      const Words words = load_eight(row, 8 * i, real ? call.columns : 0, call.aligned);
      call.packed[(i / 4 * call.blocks + k / 8) * 32 + k % 8 * 4 + i % 4] = words;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float number = number_of<Stored>(words.at[j / 2], j % 2);
        square += number * number;
      }
    }
    square = total<32>(square);
    if (lane != 0) continue;
    float factor = 1, offset = 0;
    if (call.reduction == Stream::kAlignment) {
      factor = square == 0 ? 0.0f : 1 / sqrtf(square);
    } else if (call.reduction == Stream::kNearest) {
      offset = -0.5f * square;
    } else if (call.bias && real) {
      offset = widen(static_cast<const Stored*>(call.bias)[k * call.bias_stride]);
    }
    call.constants[k] = factor;
    call.constants[8 * call.blocks + k] = offset;
  }
}

}  // namespace oodkern::device
