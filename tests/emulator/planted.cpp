// Kernels with planted faults, and their correct twins: what the emulator has to catch, and what it must let pass.
#include "program.h"

#include "cuda/atomics.cuh"
#include "cuda/mma.cuh"

using namespace oodkern::device;

namespace {

constexpr int kCaseThreads = 96;

// Every thread's neighbour's number, through shared memory; `kBarrier` false leaves the barrier out.
template <bool kBarrier>
__global__ void neighbours(float* out) {  // [kCaseThreads]
  OODKERN_SHARED(float, words, kCaseThreads);
  const int i = int(threadIdx.x);
  words.store(i, float(i));
  if constexpr (kBarrier) __syncthreads();
  out[i] = words.load((i + 40) % kCaseThreads);
}

// The same inside a warp, behind a barrier of the warp, a shuffle (which orders no memory), or none.
enum class Between { kSyncwarp, kShuffle, kHalfSyncwarp };
template <Between kBetween>
__global__ void lanes(float* out) {  // [kCaseThreads]
  OODKERN_DYNAMIC_SHARED(float, words);
  const int i = int(threadIdx.x);
  words.store(i, float(i));
  if constexpr (kBetween == Between::kSyncwarp) __syncwarp();
  if constexpr (kBetween == Between::kShuffle) __shfl_xor_sync(0xffffffffu, 1, 1);
  if constexpr (kBetween == Between::kHalfSyncwarp) __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  out[i] = words.load(i ^ 16);
}

// Words that are written again while others may still read them.
__global__ void written_again(float* out) {  // [kCaseThreads]
  OODKERN_SHARED(float, words, kCaseThreads);
  const int i = int(threadIdx.x);
  words.store(i, float(i));
  __syncthreads();
  out[i] = words.load(kCaseThreads - 1 - i);
  words.store(i, 0.0f);
}

__global__ void unwritten(float* out) {  // [kCaseThreads]
  OODKERN_SHARED(float, words, kCaseThreads);
  const int i = int(threadIdx.x);
  if (i > 0) words.store(i, 1.0f);
  __syncthreads();
  out[i] = words.load(i);
}

__global__ void outside_shared(float* out) {  // [kCaseThreads]
  OODKERN_DYNAMIC_SHARED(float, words);
  words.store(int(threadIdx.x) + 1, 1.0f);
  out[threadIdx.x] = 1.0f;
}

template <int kShift>
__global__ void shifted(float* out) {  // [kCaseThreads]
  out[int(threadIdx.x) + kShift] = 1.0f;
}

template <int kShift>
__global__ void shifted_load(float* out, const float* in) {  // [kCaseThreads] both
  out[threadIdx.x] = in[int(threadIdx.x) + kShift];
}

// A barrier that one branch alone reaches; one in each branch; one that some threads do not live to see.
__global__ void barrier_of_some(float* out) {
  if (threadIdx.x < 50) __syncthreads();
  out[threadIdx.x] = 1.0f;
}
__global__ void barrier_of_two_branches(float* out) {
  if (threadIdx.x < 50) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}
__global__ void shuffle_of_some(float* out) {
  float x = float(threadIdx.x);
  if (threadIdx.x % 32 < 20) x = __shfl_xor_sync(0xffffffffu, x, 1);
  out[threadIdx.x] = x;
}
__global__ void shuffle_from_outside_the_mask(float* out) {
  float x = float(threadIdx.x);
  if (threadIdx.x % 32 < 16) x = __shfl_sync(0x0000ffffu, x, 20);
  out[threadIdx.x] = x;
}
__global__ void shuffle_without_oneself(float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, float(threadIdx.x), 3);
}

template <int kShift>
__global__ void vectors(float* out, const float* in) {  // [4 kCaseThreads] both
  store_vector(out + 4 * threadIdx.x, load_vector(in + 4 * threadIdx.x + kShift));
}

// Everything that warps say to one another; 0 in every word where it was said right.
__global__ void warp_words(float* out) {  // [kCaseThreads]
  const int i = int(threadIdx.x), lane = i % 32, warp = i / 32;
  int wrong = 0;
  wrong += __shfl_xor_sync(0xffffffffu, i, 5) != (i ^ 5);
  wrong += __shfl_xor_sync(0xffffffffu, i, 3, 8) != (i ^ 3);
  wrong += __shfl_down_sync(0xffffffffu, i, 4u) != (lane < 28 ? i + 4 : i);
  wrong += __shfl_down_sync(0xffffffffu, i, 1u, 8) != (lane % 8 < 7 ? i + 1 : i);
  wrong += __shfl_sync(0xffffffffu, i, 7) != 32 * warp + 7;
  wrong += __shfl_sync(0xffffffffu, i, 1, 4) != i / 4 * 4 + 1;
  wrong += __shfl_sync(0xffffffffu, double(i) + 0.5, 9) != 32 * warp + 9.5;
  wrong += __ballot_sync(0xffffffffu, lane < 3) != 7u;
  wrong += !__any_sync(0xffffffffu, lane == 31) + __any_sync(0xffffffffu, lane > 31);
  wrong += __all_sync(0xffffffffu, lane > 0) + !__all_sync(0xffffffffu, lane >= 0);
  if (lane < 8) wrong += __shfl_xor_sync(0x000000ffu, i, 1) != (i ^ 1);  // the others go ahead
  out[i] = float(wrong);
}

// A warp's product A B + C of matrices whose elements all differ: A [16, 16] = 0, 1, ..., B [16, 8] = 1, 2, ...,
// C [16, 8] = 0, 1, ..., each plus 1,000 times the warp; every one is placed as the PTX ISA's tables say.
template <class Stored>
__global__ void product(float* out) {  // [warps, 16, 8]
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const auto word = [](int low, int high) {
    Stored numbers[2];
    narrow(float(low), &numbers[0]);
    narrow(float(high), &numbers[1]);
    return uint32_t(numbers[0].bits) | uint32_t(numbers[1].bits) << 16;
  };
  const auto a = [&](int row, int k) { return word(16 * row + k, 16 * row + k + 1); };
  const auto b = [&](int k, int column) { return word(1 + 8 * k + column, 1 + 8 * (k + 1) + column); };
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = float(1000 * warp + (g + i / 2 * 8) * 8 + 2 * t + i % 2);
  mma_16x8x16(Stored(), c, a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8), b(2 * t, g),
              b(2 * t + 8, g));
  for (int i = 0; i < 4; ++i) out[warp * 128 + (g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}
__global__ void product_of_some(float* out) {
  float c[4] = {};
  if (threadIdx.x % 32 < 20) mma_16x8x16(BFloat16(), c, 0, 0, 0, 0, 0, 0);
  out[threadIdx.x] = c[0];
}

// Words that come by asynchronous copies, kVectors of them, read by a neighbour.
constexpr int kVectors = kCaseThreads / 4;
enum class Copies { kAwaited, kNotAwaited, kWithoutBarrier, kOverReaders };
template <Copies kCopies>
__global__ void copied(float* out, const float* in) {  // [kCaseThreads] both
  OODKERN_DYNAMIC_SHARED(Words, words);
  const int i = int(threadIdx.x);
  const auto copy = [&] {
    if (i < kVectors) copy_async(words, i, reinterpret_cast<const Words*>(in) + i);
  };
  copy();
  if constexpr (kCopies != Copies::kNotAwaited) wait_for_copies();
  if constexpr (kCopies != Copies::kWithoutBarrier) __syncthreads();
  const Words neighbour = load_words(words, (i / 4 + 7) % kVectors);
  std::memcpy(out + i, &neighbour.at[i % 4], sizeof(float));
  if constexpr (kCopies == Copies::kOverReaders) copy();
}

// Atomic operations on shared and on device memory: how many threads there are, and the last one's number. What is
// left out or put in makes the faults.
enum class Atomics { kCorrect, kBeforeTheStore, kReadAtOnce, kStoredAtOnce, kChangedAfterARead, kUnwritten };
template <Atomics kFault>
__global__ void atomics(float* out) {  // [kCaseThreads]
  OODKERN_SHARED(uint64_t, shared, 2);
  unsigned* counter = reinterpret_cast<unsigned*>(out);
  const int i = int(threadIdx.x);
  if (i < 2 && kFault != Atomics::kUnwritten) shared.store(i, 0);
  if (i == 0) *counter = 0;
  if constexpr (kFault != Atomics::kBeforeTheStore) __syncthreads();
  if constexpr (kFault == Atomics::kChangedAfterARead) out[i] = float(shared.load(0));
  const uint64_t before = atomic_sum(shared, 0, uint64_t(1));
  if (relaxed(shared, 1) < uint64_t(i)) atomic_largest(shared, 1, uint64_t(i));
  if constexpr (kFault == Atomics::kStoredAtOnce) shared.store(0, 7);
  const bool first = atomic_sum(counter, 2u) == 0;
  if constexpr (kFault != Atomics::kReadAtOnce) __syncthreads();
  const uint64_t count = shared.load(0), last = shared.load(1);
  const bool as_many = relaxed(counter) == 2 * count && before < count && (!first || before == 0);
  __syncthreads();
  out[i] = as_many && last == kCaseThreads - 1 ? float(count) : -1.0f;
}

// Depends on the order of the threads, through global memory.
__global__ void first_comes(float* out) {  // [kCaseThreads], poison at first
  const float before = out[0];
  out[threadIdx.x] = before != before ? 0.0f : 1.0f;
}

struct Case {
  const char* name;
  void (*run)(float* out, const float* in);
};

template <class Kernel>
void go(Kernel kernel, float* out) {
  emulator::launch("planted", kernel, 2, kCaseThreads, kCaseThreads * sizeof(float), out);
}
template <class Kernel>
void go(Kernel kernel, float* out, const float* in) {
  emulator::launch("planted", kernel, 1, kCaseThreads, kCaseThreads * sizeof(float), out, in);
}

const Case kCases[] = {
    {"neighbours", [](float* out, const float*) { go(neighbours<true>, out); }},
    {"lanes", [](float* out, const float*) { go(lanes<Between::kSyncwarp>, out); }},
    {"shifted by 0", [](float* out, const float*) { go(shifted<0>, out); }},
    {"load shifted by 0", [](float* out, const float* in) { go(shifted_load<0>, out, in); }},
    {"vectors", [](float* out, const float* in) { go(vectors<0>, out, in); }},
    {"warp words", [](float* out, const float*) { go(warp_words, out); }},
    {"atomics", [](float* out, const float*) { go(atomics<Atomics::kCorrect>, out); }},
    {"first comes", [](float* out, const float*) { go(first_comes, out); }},
    {"product of bfloat16", [](float* out, const float*) { go(product<BFloat16>, out); }},
    {"product of float16", [](float* out, const float*) { go(product<Float16>, out); }},
    {"copied", [](float* out, const float* in) { go(copied<Copies::kAwaited>, out, in); }},
    {"missing barrier", [](float* out, const float*) { go(neighbours<false>, out); }},
    {"shuffle as a barrier", [](float* out, const float*) { go(lanes<Between::kShuffle>, out); }},
    {"barrier of half a warp", [](float* out, const float*) { go(lanes<Between::kHalfSyncwarp>, out); }},
    {"written again", [](float* out, const float*) { go(written_again, out); }},
    {"unwritten", [](float* out, const float*) { go(unwritten, out); }},
    {"atomic before the store", [](float* out, const float*) { go(atomics<Atomics::kBeforeTheStore>, out); }},
    {"atomic read at once", [](float* out, const float*) { go(atomics<Atomics::kReadAtOnce>, out); }},
    {"atomic stored at once", [](float* out, const float*) { go(atomics<Atomics::kStoredAtOnce>, out); }},
    {"atomic after a read", [](float* out, const float*) { go(atomics<Atomics::kChangedAfterARead>, out); }},
    {"atomic on nothing", [](float* out, const float*) { go(atomics<Atomics::kUnwritten>, out); }},
    {"outside shared memory", [](float* out, const float*) { go(outside_shared, out); }},
    {"store behind the end", [](float* out, const float*) { go(shifted<4 * kCaseThreads - kCaseThreads + 1>, out); }},
    {"store before the beginning", [](float* out, const float*) { go(shifted<-1>, out); }},
    {"load behind the end",
     [](float* out, const float* in) { go(shifted_load<4 * kCaseThreads - kCaseThreads + 1>, out, in); }},
    {"barrier of some", [](float* out, const float*) { go(barrier_of_some, out); }},
    {"barrier of two branches", [](float* out, const float*) { go(barrier_of_two_branches, out); }},
    {"shuffle of some", [](float* out, const float*) { go(shuffle_of_some, out); }},
    {"shuffle from outside the mask", [](float* out, const float*) { go(shuffle_from_outside_the_mask, out); }},
    {"shuffle without oneself", [](float* out, const float*) { go(shuffle_without_oneself, out); }},
    {"product of some", [](float* out, const float*) { go(product_of_some, out); }},
    {"copies not awaited", [](float* out, const float* in) { go(copied<Copies::kNotAwaited>, out, in); }},
    {"copies without a barrier", [](float* out, const float* in) { go(copied<Copies::kWithoutBarrier>, out, in); }},
    {"copies over readers", [](float* out, const float* in) { go(copied<Copies::kOverReaders>, out, in); }},
    {"misaligned vectors", [](float* out, const float* in) { go(vectors<1>, out, in); }},
};

}  // namespace

// Runs one of them over out [4 kCaseThreads] with in [4 kCaseThreads] = 0, 1, 2...; gives what the emulator said.
extern "C" const char* run_planted(const char* name, int order, int seed, float* out) {
  return emulator::guarded([&] {
    emulator::settings = {emulator::Order(order), unsigned(seed)};
    std::vector<float> numbers(4 * kCaseThreads);
    std::iota(numbers.begin(), numbers.end(), 0.0f);
    const size_t bytes = numbers.size() * sizeof(float);
    emulator::Buffer output("out", bytes, 0), input("in", bytes, 0, numbers.data());
    for (const Case& one : kCases) {
      if (std::strcmp(one.name, name)) continue;
      one.run(output.data<float>(), input.data<float>());
      input.finish();
      output.finish(out);
      return;
    }
    throw emulator::Error("no such case");
  });
}

// For the sanitizers: the program's arguments are names of cases.
int main(int count, char** names) {
  std::vector<float> out(4 * kCaseThreads);
  for (int i = 1; i < count; ++i) {
    for (int order = 0; order < 3; ++order) {
      const std::string said = run_planted(names[i], order, 1, out.data());
      if (!said.empty()) {
        std::fprintf(stderr, "%s: %s\n", names[i], said.c_str());
        return 3;
      }
    }
  }
  return 0;
}
