// Features on their way from memory to the tensor cores: the eight consecutive elements of a slab that a lane owns in
// each of its rows, some slabs ahead.
#pragma once

#include "mma.cuh"

namespace oodkern::device {

// Elements [at, at + 8) of a row, zeros behind its end. Where addresses are no multiples of 16, or the row ends, one
// after another.
template <class Stored>
__device__ __forceinline__ Words load_eight(const Stored* row, int at, int columns, bool aligned) {
  if (aligned && at + 8 <= columns) return load_words(row + at);
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int i = at; i < at + 4; ++i) {
    low = low >> 16 | uint64_t(i < columns ? row[i].bits : 0) << 48;
    high = high >> 16 | uint64_t(i + 4 < columns ? row[i + 4].bits : 0) << 48;
  }
  return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}

// Slabs in the order in which they are multiplied: of a tile of rows `passes` times all of them, rounded up to whole
// groups of kStages, then those of the block's next tile. Row i of a lane is g of the warp's i-th eight rows; lanes
// behind the last row read that once more.
template <class Stored, int kTiles, int kStages>
struct FeatureStream {
  const Stored* features;
  int64_t stride, rows;
  int columns;
  bool aligned;
  int passes, warps;

  Words words[kStages][2 * kTiles];
  const Stored* fetched[2 * kTiles];
  int64_t tile;
  int pass = 0, slab = 0;  // to be fetched next

  __device__ __forceinline__ FeatureStream(const void* from, int64_t row_stride, int64_t row_count, int column_count,
                                           bool rows_aligned, int pass_count, int warp_count)
      : features(static_cast<const Stored*>(from)),
        stride(row_stride),
        rows(row_count),
        columns(column_count),
        aligned(rows_aligned),
        passes(pass_count),
        warps(warp_count),
        tile(blockIdx.x) {}

  __device__ __forceinline__ int64_t row_of(int64_t of_tile, int i) const {
    const int thread = int(threadIdx.x);
    return ((of_tile * warps + thread / 32) * 2 * kTiles + i) * 8 + thread % 32 / 4;
  }
  __device__ __forceinline__ const Stored* address_of(int64_t row) const {
    return features + (row < rows ? row : rows - 1) * stride;
  }
  __device__ __forceinline__ void find_rows() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) fetched[i] = address_of(row_of(tile, i));
  }
  __device__ __forceinline__ void fetch(int stage) {
    const int at = slab * kSlab + int(threadIdx.x) % 4 * 8;
    if (aligned && (slab + 1) * kSlab <= columns) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) words[stage][i] = load_words(fetched[i] + at);
    } else if (slab * kSlab < columns) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) words[stage][i] = load_eight(fetched[i], at, columns, aligned);
    }
    ++slab;
  }
  __device__ __forceinline__ void begin() {
    find_rows();
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(stage);
  }
  // Before a group is multiplied, whose stages are then fetched again one after another.
  __device__ __forceinline__ void next_group() {
    if (slab * kSlab < columns) return;
    slab = 0;
    if (++pass < passes) return;
    pass = 0;
    tile += gridDim.x;
    find_rows();
  }
};

}  // namespace oodkern::device
