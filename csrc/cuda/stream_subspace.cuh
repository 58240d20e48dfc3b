// |U^T x|^2 and |x - U U^T x|^2 of 16-bit features and a basis U [D, r] of few columns, by the tensor cores' bfloat16
// products and yet with float32's digits: what is multiplied is split into bfloat16 numbers of 8 bits each, three for
// float32 (24 bits), two for float16 (11), one for bfloat16, and products of parts are summed where they count. Parts
// p of one factor and q of the other are 2^-8(p + q) of the product, so those with p + q <= 2 are what float32 holds.
//
// A warp owns 16 rows: y = U^T x in the first pass over its features, whose sums are then the left factor of
// x - U y, slab by slab in the second: c_0, c_1 of two blocks of classes are a_0, a_1 and a_4, a_5 of 16 k (mma.cuh).
// Features of the second pass come from the cache. Column n of the second product's block b is element
// 8 (n / 2) + 2 b + n % 2 of a slab, so that lane t holds its own eight. The basis is packed for both passes, an item a
// slab and pass, and copied group by group for all warps of a block:
//
//   first   [parts, r / 8, 32 lanes]: lane 4 g + t has columns 8 b + g of U at rows 32 s + 8 t..+7
//   second  [parts, 2, r / 16, 32 lanes]: two blocks h, k = 16 i..; for each the words k + 2 t, k + 2 t + 8 of its
//   column g
//
// What bounds it, at D = 512, 132 multiprocessors of 1.75 GHz and 1,024 multiply-adds a cycle: 3 r D of them a row in
// the first pass and 6 r D in the second are 2.2 ns at r = 100 (112 with what fills blocks up), seven times what 1 KB
// of features takes from HBM3; at r = 10 (16) they take as long as memory does. In float32 proper
// the two products take 2 r D multiply-adds of which 128 are done a cycle: 3.5 ns.
#pragma once

#include <type_traits>

#include "row.cuh"
#include "stream_features.cuh"

namespace oodkern::device {

// Part `which` of a number: what is left of it after the parts before, rounded.
__device__ __forceinline__ BFloat16 part_of(float number, int which) {
  BFloat16 part;
  narrow(number, &part);
  for (int i = 0; i < which; ++i) {
    // Nothing is left of an infinity.
    number = fabsf(widen(part)) < INFINITY ? number - widen(part) : 0.0f;
    narrow(number, &part);
  }
  return part;
}
__device__ __forceinline__ uint32_t parts_of(float low, float high, int which) {
  return uint32_t(part_of(low, which).bits) | uint32_t(part_of(high, which).bits) << 16;
}

struct SubspaceCall {
  const void* features;  // [rows, columns]
  int64_t features_stride;
  int64_t rows;
  int columns;
  int rank;
  bool aligned;
  int parts;            // of a number of the basis
  const Words* packed;  // [2 slabs, parts, 8 kBlocks / 8, 32]
  float* inside;        // [rows]
  float* outside;
};

struct PackBasisCall {
  const void* basis;  // [columns, rank]
  int64_t row_stride, column_stride;
  int columns;
  int rank;
  int parts;
  int blocks;
  Words* packed;
};

template <class Stored>
__global__ void __launch_bounds__(kThreads, 2) pack_basis(const PackBasisCall call) {
  const int slabs = (call.columns + kSlab - 1) / kSlab, part_words = call.blocks * 32;
  const int64_t words = int64_t(2) * slabs * call.parts * part_words;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + int(threadIdx.x); at < words;
       at += int64_t(gridDim.x) * kThreads) {
    const int place = int(at % part_words), part = int(at / part_words % call.parts);
    const int64_t item = at / part_words / call.parts;
    const bool second = item >= slabs;
    const int64_t slab = second ? item - slabs : item;
    const int lane = place % 32, g = lane / 4, t = lane % 4;
    const auto number = [&](int i) {
      int64_t d = slab * kSlab;
      int j;
      if (second) {
        const int steps = call.blocks / 2, step = place / 32 % steps, block = place / 32 / steps * 2 + i / 4;
        d += 8 * (g / 2) + 2 * block + g % 2;
        j = 16 * step + 2 * t + i % 2 + i % 4 / 2 * 8;
      } else {
        d += 8 * t + i;
        j = place / 32 * 8 + g;
      }
      if (d >= call.columns || j >= call.rank) return 0.0f;
      return widen(static_cast<const Stored*>(call.basis)[d * call.row_stride + j * call.column_stride]);
    };
    Words words_here;
#pragma unroll
    for (int i = 0; i < 4; ++i) words_here.at[i] = parts_of(number(2 * i), number(2 * i + 1), part);
    call.packed[at] = words_here;
  }
}

// Slabs of a group, as shared memory holds two of.
template <int kBlocks>
struct SubspaceShape {
  static constexpr int kStages = kBlocks <= 8 ? 4 : kBlocks <= 14 ? 2 : 1;
  static constexpr int kRows = kWarps * 16;                  // of a block
  static constexpr int kGroup = kStages * 3 * kBlocks * 32;  // Words of a group of three parts
};

template <class Stored, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) subspace_rows(const SubspaceCall call) {
  using Shape = SubspaceShape<kBlocks>;
  constexpr int kStages = Shape::kStages, kSteps = kBlocks / 2;
  constexpr int kXParts = std::is_same_v<Stored, BFloat16> ? 1 : 2;
  OODKERN_DYNAMIC_SHARED(Words, basis);
  const int thread = int(threadIdx.x), lane = thread % 32, t = lane % 4;
  const int slabs = (call.columns + kSlab - 1) / kSlab, item = call.parts * kBlocks * 32;
  const int64_t tiles = (call.rows + Shape::kRows - 1) / Shape::kRows;
  FeatureStream<Stored, 1, kStages> x(call.features, call.features_stride, call.rows, call.columns, call.aligned, 2,
                                      kWarps);
  const auto copy = [&](int to, int pass, int slab) {
    const int count = (slabs - slab < kStages ? slabs - slab : kStages) * item;
    const Words* from = call.packed + int64_t(pass * slabs + slab) * item;
    for (int i = thread; i < count; i += kThreads) copy_async(basis, to + i, from + i);
  };
  copy(0, 0, 0);
  x.begin();
  int buffer = 0;
  // The group at `slab` of a pass is there for everyone behind the barrier, and everyone has left the one before it,
  // which the next one is copied over.
  const auto take_group = [&](int64_t tile, int pass, int slab) {
    x.next_group();
    wait_for_copies();
    __syncthreads();
    const int from = buffer;
    buffer = Shape::kGroup - buffer;
    const bool more = slab + kStages < slabs;
    const int next_pass = more ? pass : 1 - pass;
    if (more || pass == 0 || tile + gridDim.x < tiles) copy(buffer, next_pass, more ? slab + kStages : 0);
    return from;
  };

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float y[kBlocks][4] = {};
    for (int group = 0; group < slabs; group += kStages) {
      const int from = take_group(tile, 0, group);
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        if (group + stage < slabs) {
          Words own[kXParts][2];
#pragma unroll
          for (int q = 0; q < kXParts; ++q) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const uint32_t word = x.words[stage][i / 4].at[i % 4];
              own[q][i / 4].at[i % 4] =
                  kXParts == 1 ? word : parts_of(number_of<Stored>(word, 0), number_of<Stored>(word, 1), q);
            }
          }
          for (int p = 0; p < call.parts; ++p) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
              const Words u = load_words(basis, from + stage * item + (p * kBlocks + b) * 32 + lane);
#pragma unroll
              for (int q = 0; q < kXParts; ++q) {
                const Words &low = own[q][0], &high = own[q][1];
                mma_16x8x16(BFloat16(), y[b], low.at[0], high.at[0], low.at[1], high.at[1], u.at[0], u.at[1]);
                mma_16x8x16(BFloat16(), y[b], low.at[2], high.at[2], low.at[3], high.at[3], u.at[2], u.at[3]);
              }
            }
          }
        }
        x.fetch(stage);
      }
    }
    float inside[2] = {}, outside[2] = {};
    uint32_t parts[3][kSteps][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // An infinite feature makes NaN of what is not there.
        if (8 * b + 2 * t + i % 2 >= call.rank) y[b][i] = 0;
        inside[i / 2] += y[b][i] * y[b][i];
      }
#pragma unroll
      for (int q = 0; q < 3; ++q) {
        parts[q][b / 2][b % 2 * 2] = parts_of(y[b][0], y[b][1], q);
        parts[q][b / 2][b % 2 * 2 + 1] = parts_of(y[b][2], y[b][3], q);
      }
    }
    for (int group = 0; group < slabs; group += kStages) {
      const int from = take_group(tile, 1, group);
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        if (group + stage < slabs) {
          float squares[2] = {};
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            // The leading parts' products and all others apart: these are lost where they are added to those, one
            // after another and cut off rather than rounded.
            float leading[2][4] = {}, rest[2][4] = {};
            for (int p = 0; p < call.parts; ++p) {
              const int place = from + stage * item + (p * 2 + h) * kSteps * 32 + lane;
#pragma unroll
              for (int step = 0; step < kSteps; ++step) {
                const Words u = load_words(basis, place + step * 32);
#pragma unroll
                for (int q = 0; q < 3; ++q) {
                  const uint32_t(&a)[4] = parts[q][step];
                  if (q == 0 && p == 0) {
                    mma_16x8x16(BFloat16(), leading[0], a[0], a[1], a[2], a[3], u.at[0], u.at[1]);
                    mma_16x8x16(BFloat16(), leading[1], a[0], a[1], a[2], a[3], u.at[2], u.at[3]);
                  } else if (p + q <= 2) {
                    mma_16x8x16(BFloat16(), rest[0], a[0], a[1], a[2], a[3], u.at[0], u.at[1]);
                    mma_16x8x16(BFloat16(), rest[1], a[0], a[1], a[2], a[3], u.at[2], u.at[3]);
                  }
                }
              }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const uint32_t word = x.words[stage][i % 4 / 2].at[2 * h + i / 4];
              const float projected = leading[i / 4][i % 4] + rest[i / 4][i % 4];
              const float residual = number_of<Stored>(word, i % 2) - projected;
              squares[i % 4 / 2] += residual * residual;
            }
          }
          outside[0] += squares[0];
          outside[1] += squares[1];
        }
        x.fetch(stage);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = x.row_of(tile, i);
      const float in = total<4>(inside[i]), out = total<4>(outside[i]);
      if (t == 0 && row < call.rows) {
        call.inside[row] = in;
        call.outside[row] = out;
      }
    }
  }
}

}  // namespace oodkern::device
