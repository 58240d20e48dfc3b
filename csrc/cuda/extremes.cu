// Room `select` on a GPU: the lowest and the highest scores of each cluster.
#include "extremes.cuh"

#include "host.h"

namespace oodkern {
namespace {

constexpr int64_t kPackedScores = int64_t(1) << 32;  // whose indices fit into half a word
constexpr int64_t kMostRounds = 32;  // passes over float32 scores, then a sort of them; chosen without a measurement
constexpr int64_t kSharedClusters = 2048;  // 32 KB of words a block
constexpr int64_t kBlocksAtOnce = 6;       // that a multiprocessor runs, at those 32 KB

struct CudaExtremes {
  static void find(const ExtremesCall& call, const Tensor& scores) {
    if (call.clusters == 0) return;
    const CudaStream stream(scores);
    if (call.storage == Storage::kFloat32 && call.per_side > kMostRounds && call.clusters < INT32_MAX &&
        call.N < INT32_MAX) {
      return by_sorting(stream, call, scores);
    }
    const bool packed = call.storage == Storage::kFloat32 && call.N < kPackedScores;
    const Tensor bests = empty_of(scores, {packed ? 0 : 2 * device::kSides * call.clusters}, ScalarType::Long);
    const device::Extremes work{call.cluster,
                                call.N,
                                call.clusters,
                                call.per_side,
                                {reinterpret_cast<uint64_t*>(call.lowest), reinterpret_cast<uint64_t*>(call.highest)},
                                packed ? nullptr : static_cast<uint64_t*>(bests.mutable_data_ptr())};
    const int64_t words = blocks_for(stream, call.clusters * call.per_side, 1);
    const int64_t blocks = blocks_for(stream, call.N, device::kScoresAtOnce);
    const auto launch = [&](const char* name, auto kernel, int64_t shared, auto... arguments) {
      if (blocks > 0) stream.launch(name, kernel, blocks, device::kThreads, shared, work, arguments...);
    };
    const auto launch_wide = [&](auto* of, int64_t round) {
      using Real = std::remove_cvref_t<decltype(*of)>;
      launch("wide_extremes", device::wide_extremes<Real, false>, 0, of, round);
      launch("wide_extremes", device::wide_extremes<Real, true>, 0, of, round);
    };
    const float* floats = static_cast<const float*>(call.scores);
    for (int64_t round = 0; round < call.per_side; ++round) {
      if (round == 0 || !packed) {
        stream.launch("clear_extremes", device::clear_extremes, words, device::kThreads, 0, work, round);
      }
      if (packed && call.clusters <= kSharedClusters) {
        const int64_t bytes = device::kSides * call.clusters * int64_t(sizeof(uint64_t));
        launch("packed_extremes", device::packed_extremes<true>, bytes, floats, round);
      } else if (packed) {
        launch("packed_extremes", device::packed_extremes<false>, 0, floats, round);
      } else if (call.storage == Storage::kFloat64) {
        launch_wide(static_cast<const double*>(call.scores), round);
      } else {
        launch_wide(floats, round);
      }
    }
    stream.launch("finish_extremes", device::finish_extremes, words, device::kThreads, 0, work);
  }

 private:
  static int64_t blocks_for(const CudaStream& stream, int64_t items, int64_t of_a_thread) {
    const int64_t each = device::kThreads * of_a_thread;
    return std::min((items + each - 1) / each, kBlocksAtOnce * stream.multiprocessors());
  }

  static void by_sorting(const CudaStream& stream, const ExtremesCall& call, const Tensor& scores) {
    const device::Extremes work{call.cluster, call.N, call.clusters, call.per_side, {}, nullptr};
    const Tensor words = empty_of(scores, {call.N}, ScalarType::Long);
    const auto launch = [&](const char* name, auto kernel, int64_t items, auto... arguments) {
      const int64_t blocks = blocks_for(stream, items, 1);
      if (blocks > 0) stream.launch(name, kernel, blocks, device::kThreads, 0, work, arguments...);
    };
    for (int side = 0; side < device::kSides; ++side) {
      launch("words_to_sort", device::words_to_sort, call.N, static_cast<const float*>(call.scores),
             static_cast<uint64_t*>(words.mutable_data_ptr()), side);
      const auto [in_order, order] = sorted(words);
      launch("take_sorted", device::take_sorted, call.clusters * call.per_side,
             static_cast<const uint64_t*>(in_order.const_data_ptr()),
             static_cast<const int64_t*>(order.const_data_ptr()), side ? call.highest : call.lowest);
    }
  }
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  m.impl("cluster_extremes", TORCH_BOX(&oodkern::cluster_extremes<oodkern::CudaExtremes>));
}
