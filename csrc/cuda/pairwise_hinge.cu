// Room `pairwise_hinge` on a GPU: the mean of relu(ood_j - id_i + margin) over all pairs, without the pairs. Both sets
// are sorted, and each score of one is looked up among the other's: with x = ood + margin in double,
// k_j = #{i : id_i < x_j}, n_i = #{j : id_i < x_j} and any c, since both counts have the same total,
//
//   sum_ij relu(x_j - id_i) = sum_j k_j (x_j - c) - sum_i n_i (id_i - c).
//
// Only scores between the lowest id and the highest x are in a pair that counts; with c among them no term is larger
// than that distance, however large the scores and wherever the others lie. The counts are the slopes.
#include "../pairwise_hinge.h"
#include "row_launch.h"

namespace oodkern {
namespace device {

// Scores of both sets, in the order that they came in and in ascending order, where NaN are at either end.
template <class Real>
struct Hinge {
  static constexpr int kWidth = Vector<Real>::kWidth;  // scores of a thread
  static constexpr int kGroup = kThreads * kWidth;     // scores of a block, of one set
  const Real* id;                                      // [N]
  const Real* ood;                                     // [M]
  const Real* sorted_id;
  const Real* sorted_ood;
  int N, M;
  int id_step, ood_step;  // the largest powers of two that are not above N and M
  double margin;
  double share;  // 1 / NM, 0 where there is no pair
  Real* id_slope;
  Real* ood_slope;

  OODKERN_HOST_DEVICE int groups_of_id() const { return (N + kGroup - 1) / kGroup; }
  OODKERN_HOST_DEVICE int groups() const { return groups_of_id() + (M + kGroup - 1) / kGroup; }
};

// What every thread reads at the ends of both sets.
struct HingeEnds {
  bool nan;       // a score is NaN, or an infinity meets itself
  double center;  // c

  template <class Real>
  static __device__ __forceinline__ HingeEnds of(const Hinge<Real>& hinge) {
    if (hinge.N == 0 || hinge.M == 0) return {false, 0};
    const double lowest_id = hinge.sorted_id[0], highest_id = hinge.sorted_id[hinge.N - 1];
    const double lowest = double(hinge.sorted_ood[0]) + hinge.margin;
    const double highest = double(hinge.sorted_ood[hinge.M - 1]) + hinge.margin;
    const bool unordered = lowest_id != lowest_id || highest_id != highest_id || lowest != lowest || highest != highest;
    const bool infinite = (highest == INFINITY && highest_id == INFINITY) ||  // less itself
                          (lowest == -INFINITY && lowest_id == -INFINITY);
    const double middle = hinge.sorted_id[hinge.N / 2];
    const double center = middle < highest ? middle : highest;
    return {unordered || infinite, fabs(center) < INFINITY ? center : 0};
  }
};

// How many of `count` numbers `holds` of, which holds of none behind the first that it does not hold of: a thread's
// searches side by side, whose reads are then under way together.
template <class Real, int kWidth, class Holds>
__device__ __forceinline__ void search(const Real* sorted, int count, int step, Holds holds, int (&found)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) found[i] = 0;
  for (; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int next = found[i] + step;
      if (next <= count && holds(i, double(sorted[next - 1]))) found[i] = next;
    }
  }
}

// The slopes of a group of one set; a thread's part of the sum of its terms.
template <class Real, bool kOfId>
__device__ __forceinline__ double count_group(const Hinge<Real>& hinge, HingeEnds ends, int64_t first) {
  constexpr int kWidth = Hinge<Real>::kWidth;
  const Real* scores = kOfId ? hinge.id : hinge.ood;
  const int64_t size = kOfId ? hinge.N : hinge.M, at = first + int64_t(threadIdx.x) * kWidth;
  const bool aligned = reinterpret_cast<uintptr_t>(scores) % 16 == 0;
  Real score[kWidth], slope[kWidth];
  int found[kWidth];
  load_elements(scores, at, size, aligned, Real(0), score);
  if constexpr (kOfId) {
    search(
        hinge.sorted_ood, hinge.M, hinge.ood_step,
        [&](int i, double ood) { return ood + hinge.margin <= double(score[i]); }, found);
  } else {
    search(
        hinge.sorted_id, hinge.N, hinge.id_step, [&](int i, double id) { return id < double(score[i]) + hinge.margin; },
        found);
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int count = kOfId ? hinge.M - found[i] : found[i];
    const double above = (double(score[i]) - ends.center) + (kOfId ? 0.0 : hinge.margin);
    if (count > 0 && at + i < size) sum += (kOfId ? -count : count) * above;
    slope[i] = ends.nan ? Real(NAN) : Real((kOfId ? -hinge.share : hinge.share) * count);
  }
  Real* slopes = kOfId ? hinge.id_slope : hinge.ood_slope;
  store_elements(slopes, at, size, reinterpret_cast<uintptr_t>(slopes) % 16 == 0, slope);
  return sum;
}

// The sum of a block's threads, for thread 0.
__device__ __forceinline__ double total_of_block(double sum) {
  OODKERN_SHARED(double, of_warps, kWarps);
  sum = total<32>(sum);
  if (threadIdx.x % 32 == 0) of_warps.store(int(threadIdx.x) / 32, sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sum += of_warps.load(warp);
  }
  __syncthreads();  // before the next sums are written over these
  return sum;
}

// Groups of the ids, then of the oods; partials [groups].
template <class Real>
__global__ void __launch_bounds__(kThreads, 2) hinge_counts(const Hinge<Real> hinge, double* partials) {
  const HingeEnds ends = HingeEnds::of(hinge);
  const int of_id = hinge.groups_of_id(), groups = hinge.groups();
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64_t first = (group < of_id ? group : group - of_id) * Hinge<Real>::kGroup;
    double sum =
        group < of_id ? count_group<Real, true>(hinge, ends, first) : count_group<Real, false>(hinge, ends, first);
    sum = total_of_block(sum);
    if (threadIdx.x == 0) partials[group] = sum;
  }
}

// One block.
template <class Real>
__global__ void __launch_bounds__(kThreads, 2)
    hinge_value(const Hinge<Real> hinge, const double* partials, Real* value) {
  double sum = 0;
  for (int64_t group = threadIdx.x; group < hinge.groups(); group += kThreads) sum += partials[group];
  sum = total_of_block(sum);
  if (threadIdx.x != 0) return;
  // The lowest id and the highest x differ by as much as the largest term: of fewer than 2^53 pairs that count,
  // rounding leaves more than 0.
  *value = HingeEnds::of(hinge).nan ? Real(NAN) : Real(sum < 0 ? 0 : sum * hinge.share);
}

}  // namespace device

namespace {

int largest_step(int64_t count) {
  int64_t step = 1;
  while (step * 2 <= count) step *= 2;
  return count > 0 ? int(step) : 0;
}

struct CudaHinge {
  // PyTorch sorts as many, and places are counted in 32 bits.
  static void check(int64_t N, int64_t M) {
    STD_TORCH_CHECK(N < int64_t(1) << 30, "id_score: expected fewer than 2^30 scores");
    STD_TORCH_CHECK(M < int64_t(1) << 30, "ood_score: expected fewer than 2^30 scores");
  }

  template <class Real>
  static void run_as(const Tensor& id, const Tensor& ood, const HingePairs& pairs) {
    const bool any = pairs.N > 0 && pairs.M > 0;
    const Tensor sorted_id = any ? std::get<0>(sorted(id)) : id, sorted_ood = any ? std::get<0>(sorted(ood)) : ood;
    const device::Hinge<Real> hinge{static_cast<const Real*>(pairs.id),
                                    static_cast<const Real*>(pairs.ood),
                                    static_cast<const Real*>(sorted_id.const_data_ptr()),
                                    static_cast<const Real*>(sorted_ood.const_data_ptr()),
                                    int(pairs.N),
                                    int(pairs.M),
                                    largest_step(pairs.N),
                                    largest_step(pairs.M),
                                    pairs.margin,
                                    any ? 1.0 / (double(pairs.N) * double(pairs.M)) : 0.0,
                                    static_cast<Real*>(pairs.id_slope),
                                    static_cast<Real*>(pairs.ood_slope)};
    const CudaStream stream(id);
    const Tensor memory = empty_of(id, {hinge.groups()}, ScalarType::Double);
    double* partials = static_cast<double*>(memory.mutable_data_ptr());
    if (hinge.groups() > 0) {
      stream.launch("hinge_counts", device::hinge_counts<Real>, hinge.groups(), device::kThreads, 0, hinge, partials);
    }
    stream.launch("hinge_value", device::hinge_value<Real>, 1, device::kThreads, 0, hinge, partials,
                  static_cast<Real*>(pairs.value));
  }
  static void run(const Tensor& id, const Tensor& ood, const HingePairs& pairs) {
    pairs.wide ? run_as<double>(id, ood, pairs) : run_as<float>(id, ood, pairs);
  }
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  OODKERN_PAIRWISE_HINGE_OPS(m, oodkern::CudaHinge);
}
