// The stream engine: row reductions of z_k = factor_k (x . w_k) + offset_k for few classes (K <= 192) of 16-bit
// numbers, at the speed at which features can be read. A warp owns 32 rows (16 beyond 104 classes), whose logits are
// float32 sums in its registers; features go from memory to registers and nowhere else, several slabs of 32 columns
// asked for together, also across the ends of tiles. Classes are packed in the order of fragments
// (stream_pack.cuh):
//
//   weight [slabs, K / 8, 32 lanes] of 16 bytes; lane 4 g + t has class 8 b + g at columns 32 s + 8 t..+7
//
// so a warp's load of shared memory is 512 consecutive bytes: a quarter of a warp covers all banks once, no conflicts.
// They lie in shared memory once a block where they fit, and are else copied group by group of slabs, of which the
// next is under way while one is multiplied.
//
// What bounds it, at K = 100 (13 blocks of 8) and 132 multiprocessors of 1.75 GHz: a slab of 32 rows is 2 KB of
// features, 13 loads of 512 B at 128 B a cycle = 52 cycles of shared memory (9 TB/s of features) and 52 mma of 2,048
// multiply-adds (4.5 TB/s at 1,024 a cycle and multiprocessor, the rate of sm_80; sm_90 is faster): above the 3.4 TB/s
// of HBM3. With 16 rows a warp, shared memory would bound it at 4.5 TB/s; at K = 192 it does, at 2.5 TB/s. To keep
// 3.4 TB/s busy at 0.7 us takes 18 KB in flight a multiprocessor: 8 warps ask for up to 3 slabs of 32 rows each, 48 KB,
// or of 16 rows, 24 KB, and wait for them once. (Arithmetic: nothing here was timed.)
#pragma once

#include "row.cuh"
#include "stream_features.cuh"

namespace oodkern::device {

constexpr int kMostClasses = 192;

enum class Stream : int { kEnergy, kJointEnergy, kScores, kAlignment, kNearest };

struct StreamCall {
  Stream reduction;
  const void* features;  // [rows, columns]
  int64_t features_stride;
  int64_t rows;
  int columns;
  int classes;
  bool aligned;            // rows begin at multiples of 16 bytes
  bool resident;           // all classes lie in shared memory, or two groups of slabs at a time
  const Words* weight;     // packed
  const float* constants;  // [2, 8 blocks]: factors, offsets
  float temperature;
  float* value;         // [rows]: the energy, the alignment, the squared distance
  float* joint_energy;  // [rows], of kScores like max_logit and msp
  float* max_logit;
  float* msp;
  int64_t* index;  // [rows]
};

// A warp's sums for 16 kTiles rows and 8 kBlocks classes: z[m][b] are c_i of mma.cuh, rows 16 m.. and classes 8 b..
template <int kTiles, int kBlocks>
struct Sums {
  float z[kTiles][kBlocks][4];
};

// Of two logits the larger, of equal ones the first; a NaN is larger than any number.
struct Top {
  float z;
  int index;
  __device__ __forceinline__ void add(float other, int other_index) {
    const bool larger = other > z || (other != other && z == z);
    const bool equal = other == z || (other != other && z != z);
    if (larger || (equal && other_index < index)) {
      z = other;
      index = other_index;
    }
  }
  __device__ __forceinline__ void merge_over_quad() {
#pragma unroll
    for (int bits = 2; bits > 0; bits /= 2) {
      const float other = __shfl_xor_sync(kAll, z, bits);
      add(other, __shfl_xor_sync(kAll, index, bits));
    }
  }
};

// The class that column i of a lane is: lane 4 g + t holds 2 columns of each block.
__device__ __forceinline__ int class_of(int i, int t) {
  return i / 2 * 8 + 2 * t + i % 2;
}

template <int kColumns>
__device__ __forceinline__ LogSumExp<Float>::State exponents_of(const LogSumExp<Float>& reducer,
                                                                const float (&z)[kColumns]) {
  float pivot = LogSumExp<Float>::init().maximum, sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) pivot = LogSumExp<Float>::pivot(z[i], pivot);
  pivot = largest<LogSumExp<Float>, 4>(pivot);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum += reducer.add(z[i], pivot);
  return {pivot, total<4>(sum)};
}
template <int kColumns>
__device__ __forceinline__ float joint_energy_of(const float (&z)[kColumns]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum += SoftplusSum<Float>(1.0).add(z[i], 0);
  return total<4>(sum);
}
template <int kColumns>
__device__ __forceinline__ Top top_of(const float (&z)[kColumns], int t) {
  Top top{z[0], class_of(0, t)};
#pragma unroll
  for (int i = 1; i < kColumns; ++i) top.add(z[i], class_of(i, t));
  top.merge_over_quad();
  return top;
}

// What becomes of a row's logits, of which each lane of a quad has kColumns; `square` is the quad's share of |x|^2.
// For kNearest the index alone.
template <int kColumns, class Constants>
__device__ __forceinline__ int finish_row(const StreamCall& call, const Constants& constants, int64_t row,
                                          float (&z)[kColumns], float square) {
  const int t = int(threadIdx.x) % 4;
  const bool leader = t == 0 && row < call.rows;
  // What is not there adds nothing: to exponents, softplus, maxima; to magnitudes.
  const float outside = call.reduction == Stream::kAlignment ? 0.0f : -INFINITY;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int k = class_of(i, t);
    const float logit = z[i] * constants.load(k) + constants.load(4 * kColumns + k);
    z[i] = k < call.classes ? logit : outside;
  }
  if (call.reduction == Stream::kAlignment) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum += fabsf(z[i]);
    sum = total<4>(sum);
    const float norm = sqrtf(total<4>(square));
    if (leader) call.value[row] = norm == 0 ? 0.0f : sum / norm / float(call.classes);
    return 0;
  }
  if (call.reduction == Stream::kNearest) return top_of(z, t).index;
  if (call.reduction == Stream::kEnergy || call.reduction == Stream::kScores) {
    const LogSumExp<Float> reducer(call.temperature);
    const LogSumExp<Float>::State state = exponents_of(reducer, z);
    if (leader) call.value[row] = -reducer.value(state);
    if (call.reduction == Stream::kScores) {
      const Top top = top_of(z, t);
      if (leader) {
        call.max_logit[row] = top.z;
        call.index[row] = top.index;
        // exp(max_logit + energy): of an infinite maximum inf - inf.
        call.msp[row] = fabsf(top.z) == INFINITY ? NAN : 1 / state.sum;
      }
    }
  }
  if (call.reduction == Stream::kJointEnergy || call.reduction == Stream::kScores) {
    const float sum = joint_energy_of(z);
    float* out = call.reduction == Stream::kScores ? call.joint_energy : call.value;
    if (leader) out[row] = sum;
  }
  return 0;
}

// Slabs ahead of the tensor cores, as registers allow beside the sums.
template <int kBlocks>
struct StreamShape {
  static constexpr int kTiles = kBlocks <= 13 ? 2 : 1;  // of 16 rows
  static constexpr int kStages = kBlocks <= 8 ? 4 : 3;
  static constexpr int kRows = kWarps * 16 * kTiles;     // of a block
  static constexpr int kGroup = kStages * kBlocks * 32;  // Words of a group of slabs
};

template <class Stored, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) stream_rows(const StreamCall call) {
  using Shape = StreamShape<kBlocks>;
  constexpr int kTiles = Shape::kTiles, kStages = Shape::kStages, kGroup = Shape::kGroup;
  OODKERN_DYNAMIC_SHARED(Words, weight);
  OODKERN_SHARED(float, constants, 16 * kBlocks);
  const int thread = int(threadIdx.x), lane = thread % 32, t = lane % 4;
  const int slabs = (call.columns + kSlab - 1) / kSlab;
  const int64_t tiles = (call.rows + Shape::kRows - 1) / Shape::kRows;

  FeatureStream<Stored, kTiles, kStages> x(call.features, call.features_stride, call.rows, call.columns, call.aligned,
                                           1, kWarps);
  const auto copy = [&](int to, int slab) {
    const int count = (slabs - slab < kStages ? slabs - slab : kStages) * kBlocks * 32;
    for (int i = thread; i < count; i += kThreads) {
      copy_async(weight, to + i, call.weight + int64_t(slab) * kBlocks * 32 + i);
    }
  };

  for (int i = thread; i < 16 * kBlocks; i += kThreads) constants.store(i, call.constants[i]);
  for (int slab = 0; slab < (call.resident ? slabs : kStages); slab += kStages) copy(slab * kBlocks * 32, slab);
  x.begin();
  if (call.resident) wait_for_copies();
  __syncthreads();

  int buffer = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Sums<kTiles, kBlocks> sums{};
    float squares[2 * kTiles] = {};
    for (int group = 0; group < slabs; group += kStages) {
      x.next_group();
      int from = group * kBlocks * 32;
      if (!call.resident) {
        // Behind the barrier this group is there for everyone, and everyone has left the one before it, which the
        // next one is copied over.
        wait_for_copies();
        __syncthreads();
        from = buffer;
        buffer = kGroup - buffer;
        const int next = group + kStages < slabs ? group + kStages : 0;
        if (next > 0 || tile + gridDim.x < tiles) copy(buffer, next);
      }
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        if (group + stage < slabs) {
          const Words(&own)[2 * kTiles] = x.words[stage];
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            const Words w = load_words(weight, from + (stage * kBlocks + b) * 32 + lane);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              const Words &low = own[2 * m], &high = own[2 * m + 1];
              mma_16x8x16(Stored(), sums.z[m][b], low.at[0], high.at[0], low.at[1], high.at[1], w.at[0], w.at[1]);
              mma_16x8x16(Stored(), sums.z[m][b], low.at[2], high.at[2], low.at[3], high.at[3], w.at[2], w.at[3]);
            }
          }
          if (call.reduction == Stream::kAlignment) {
#pragma unroll
            for (int i = 0; i < 16 * kTiles; ++i) {
              const float number = number_of<Stored>(own[i / 8].at[i % 8 / 2], i % 2);
              squares[i / 8] += number * number;
            }
          }
        }
      }
      // Together: ptxas counts all these loads by one scoreboard, and who waits for one waits for all.
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) x.fetch(stage);
    }
    // Row after row by the same instructions: all of them at once would be four times as many.
    int index[2 * kTiles] = {};
#pragma unroll 1
    for (int i = 0; i < 2 * kTiles; ++i) {
      float z[2 * kBlocks] = {}, square = 0;
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        if (i != j) continue;
        square = squares[j];
#pragma unroll
        for (int k = 0; k < 2 * kBlocks; ++k) z[k] = sums.z[j / 2][k / 2][j % 2 * 2 + k % 2];
      }
      const int found = finish_row(call, constants, x.row_of(tile, i), z, square);
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) index[j] = i == j ? found : index[j];
    }
    if (call.reduction != Stream::kNearest) continue;
    // The distance to the one center, as sum (x - c)^2, which does not cancel; features come from the cache.
    float distance[2 * kTiles] = {};
    for (int slab = 0; slab < slabs; ++slab) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const Words a = load_eight(x.address_of(x.row_of(tile, i)), slab * kSlab + 8 * t, call.columns, call.aligned);
        const int at = (slab * kBlocks + index[i] / 8) * 32 + index[i] % 8 * 4 + t;
        const Words c = call.resident ? load_words(weight, at) : load_words(call.weight + at);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float d = number_of<Stored>(a.at[j / 2], j % 2) - number_of<Stored>(c.at[j / 2], j % 2);
          sum += d * d;
        }
        distance[i] += sum;
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int64_t row = x.row_of(tile, i);
      const float sum = total<4>(distance[i]);
      if (t == 0 && row < call.rows) {
        call.value[row] = sum;
        call.index[row] = index[i];
      }
    }
  }
}

}  // namespace oodkern::device
