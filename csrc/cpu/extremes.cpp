// Room `select` on the CPU: the lowest and the highest scores of each cluster, in one pass, in heaps that lie in the
// result.
#include <algorithm>

#include "../check.h"

namespace oodkern {
namespace {

// The best of each cluster seen so far, best meaning a large key = sign * score, then a low index.
template <class Real>
class Heaps {
 public:
  Heaps(const Real* scores, Real sign, int64_t clusters, int64_t per_side, int64_t* slots)
      : scores_(scores), sign_(sign), clusters_(clusters), per_side_(per_side), slots_(slots), worst_(clusters) {
    std::fill_n(slots, clusters * per_side, int64_t(-1));
    counts_.assign(clusters, 0);
  }
  // Scores come in ascending order of their indices, so of equals the one that is there stays.
  void offer(int64_t i, int64_t cluster) {
    const Real key = sign_ * scores_[i];
    int64_t& count = counts_[cluster];
    int64_t* heap = slots_ + cluster * per_side_;
    if (count < per_side_) {
      heap[count++] = i;
    } else if (key > worst_[cluster]) {
      std::pop_heap(heap, heap + count, better());
      heap[count - 1] = i;
    } else {
      return;
    }
    std::push_heap(heap, heap + count, better());
    worst_[cluster] = sign_ * scores_[heap[0]];
  }
  void finish() {
    for (int64_t c = 0; c < clusters_; ++c) {
      int64_t* heap = slots_ + c * per_side_;
      std::sort_heap(heap, heap + counts_[c], better());
    }
  }

 private:
  auto better() const {
    return [this](int64_t a, int64_t b) {
      const Real x = sign_ * scores_[a], y = sign_ * scores_[b];
      return x > y || (x == y && a < b);
    };
  }

  const Real* scores_;
  Real sign_;
  int64_t clusters_, per_side_;
  int64_t* slots_;           // [clusters, per_side], the worst of a heap first
  std::vector<Real> worst_;  // [clusters] key of the first slot
  std::vector<int64_t> counts_;
};

template <class Real>
void find_extremes(const Real* scores, const int64_t* cluster, int64_t N, int64_t clusters, int64_t per_side,
                   int64_t* lowest, int64_t* highest) {
  Heaps<Real> low(scores, Real(-1), clusters, per_side, lowest), high(scores, Real(1), clusters, per_side, highest);
  for (int64_t i = 0; i < N; ++i) {
    if (scores[i] != scores[i]) continue;
    low.offer(i, cluster[i]);
    high.offer(i, cluster[i]);
  }
  low.finish();
  high.finish();
}

std::tuple<Tensor, Tensor> cluster_extremes(const Tensor& score, const Tensor& cluster, int64_t clusters,
                                            int64_t per_side) {
  const ScalarType dtype = score.scalar_type();
  STD_TORCH_CHECK(score.dim() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
                  "score: expected [N] float64 or float32");
  STD_TORCH_CHECK(sizes_of(cluster) == sizes_of(score) && cluster.scalar_type() == ScalarType::Long,
                  "cluster: expected one int64 a score");
  STD_TORCH_CHECK(clusters >= 0, "clusters: expected 0 or more, got ", clusters);
  STD_TORCH_CHECK(per_side >= 1, "per_side: expected 1 or more, got ", per_side);
  const Tensor scores = torch::stable::contiguous(score), labels = torch::stable::contiguous(cluster);
  const int64_t N = score.size(0);
  const int64_t* of = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t i = 0; i < N; ++i) {
    STD_TORCH_CHECK(of[i] >= 0 && of[i] < clusters, "cluster: expected 0..", clusters - 1, ", got ", of[i]);
  }
  Tensor lowest = empty_of(score, {clusters, per_side}, ScalarType::Long);
  Tensor highest = empty_of(score, {clusters, per_side}, ScalarType::Long);
  int64_t* low = static_cast<int64_t*>(lowest.mutable_data_ptr());
  int64_t* high = static_cast<int64_t*>(highest.mutable_data_ptr());
  if (dtype == ScalarType::Double) {
    find_extremes(static_cast<const double*>(scores.const_data_ptr()), of, N, clusters, per_side, low, high);
  } else {
    find_extremes(static_cast<const float*>(scores.const_data_ptr()), of, N, clusters, per_side, low, high);
  }
  return {lowest, highest};
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("cluster_extremes", TORCH_BOX(&oodkern::cluster_extremes));
}
