// Room `select` on the CPU: the lowest and the highest scores of each cluster, in one pass, in heaps that lie in the
// result.
#include <algorithm>

#include "../select.h"

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
void find_extremes(const Real* scores, const ExtremesCall& call) {
  Heaps<Real> low(scores, Real(-1), call.clusters, call.per_side, call.lowest);
  Heaps<Real> high(scores, Real(1), call.clusters, call.per_side, call.highest);
  for (int64_t i = 0; i < call.N; ++i) {
    if (scores[i] != scores[i]) continue;
    low.offer(i, call.cluster[i]);
    high.offer(i, call.cluster[i]);
  }
  low.finish();
  high.finish();
}

struct CpuExtremes {
  static void find(const ExtremesCall& call, const Tensor&) {
    for (int64_t i = 0; i < call.N; ++i) {
      STD_TORCH_CHECK(call.cluster[i] >= 0 && call.cluster[i] < call.clusters, "cluster: expected 0..",
                      call.clusters - 1, ", got ", call.cluster[i]);
    }
    if (call.storage == Storage::kFloat64) {
      find_extremes(static_cast<const double*>(call.scores), call);
    } else {
      find_extremes(static_cast<const float*>(call.scores), call);
    }
  }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("cluster_extremes", TORCH_BOX(&oodkern::cluster_extremes<oodkern::CpuExtremes>));
}
