// Room `select` on the CPU: the k best of a stream of scores. A score is compared with the k-th best that is known, and
// few pass: about k log(n / k) of n. Those are kept, and are cut back to the k best when twice as many are there.
#include <cmath>
#include <mutex>

#include "../select.h"
#include "dispatch.h"

namespace oodkern {
namespace {

constexpr int64_t kBlock = 4096;  // scores between which the threshold may rise
constexpr int64_t kGrain = 16;    // blocks that are worth a thread

// A large key = sign * score is better, then a low index: an order without ties, so that the k best are the same in
// whatever order they come.
template <class Real>
struct Candidate {
  Real key;
  int64_t index;
};
template <class Real>
bool better(const Candidate<Real>& a, const Candidate<Real>& b) {
  return a.key > b.key || (a.key == b.key && a.index < b.index);
}

// The k best come first, the worst of them last; returns how many are left. Cutting k of 2 k costs O(k).
template <class Real>
void cut(std::vector<Candidate<Real>>& candidates, int64_t k) {
  if (int64_t(candidates.size()) < k) return;
  std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), better<Real>);
  candidates.resize(k);
}

// What one thread keeps of its scores, beginning with a bar that others have set.
template <class Real>
class Kept {
 public:
  Kept(int64_t k, bool has_bar, Candidate<Real> bar) : k_(k), has_bar_(has_bar), bar_(bar) {}

  void scan(SurvivorCall call, int64_t begin, int64_t end, int64_t offset, int64_t* nans) {
    std::vector<int32_t> places(kBlock);
    std::vector<Real> keys(kBlock);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t last = std::min(end, first + kBlock);
      call.threshold = has_bar_ ? double(bar_.key) : -INFINITY;
      call.ties = !has_bar_ || offset + first < bar_.index;  // else an equal one comes after the bar
      const int64_t count = engines().scans.survivors(call, first, last, places.data(), keys.data(), nans);
      for (int64_t i = 0; i < count; ++i) offer({keys[i], offset + first + places[i]});
    }
  }
  const std::vector<Candidate<Real>>& candidates() const { return candidates_; }

 private:
  void offer(Candidate<Real> one) {
    if (has_bar_ && !better(one, bar_)) return;
    candidates_.push_back(one);
    if (int64_t(candidates_.size()) < capacity_of(k_)) return;
    cut(candidates_, k_);
    bar_ = candidates_.back();
    has_bar_ = true;
  }

  int64_t k_;
  bool has_bar_;
  Candidate<Real> bar_;
  std::vector<Candidate<Real>> candidates_;
};

// The candidates that lie in tensors from one update to the next.
template <class Real>
struct Store {
  Real* values;
  int64_t* indices;
  int64_t* state;  // how many, whether number k - 1 is the worst of k, NaN so far
  int64_t k;
  Real sign;

  Candidate<Real> at(int64_t i) const { return {sign * values[i], indices[i]}; }
  void put(int64_t i, Candidate<Real> one) {
    values[i] = sign * one.key;
    indices[i] = one.index;
  }
  void append(Candidate<Real> one) {
    put(state[0]++, one);
    if (state[0] == capacity_of(k)) reduce();
  }
  void reduce() {
    std::vector<Candidate<Real>> all(state[0]);
    for (int64_t i = 0; i < state[0]; ++i) all[i] = at(i);
    cut(all, k);
    state[0] = int64_t(all.size());
    state[1] = state[0] == k;
    for (int64_t i = 0; i < state[0]; ++i) put(i, all[i]);
  }
};

template <class Real>
void update(SurvivorCall call, int64_t count, int64_t offset, Store<Real> store) {
  const bool has_bar = store.state[1] != 0;
  const Candidate<Real> bar = has_bar ? store.at(store.k - 1) : Candidate<Real>{};
  std::mutex adding;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<std::vector<Candidate<Real>>> found;
  parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    Kept<Real> kept(store.k, has_bar, bar);
    int64_t nans = 0;
    kept.scan(call, begin * kBlock, std::min(count, end * kBlock), offset, &nans);
    const std::lock_guard<std::mutex> lock(adding);
    store.state[2] += nans;
    found.push_back(kept.candidates());
  });
  for (const auto& candidates : found) {
    for (const Candidate<Real>& one : candidates) store.append(one);
  }
  if (!store.state[1] && store.state[0] >= store.k) store.reduce();
}

struct CpuTopK {
  static void update(const TopKCall& call, const Tensor&) {
    STD_TORCH_CHECK(
        call.state[0] >= 0 && call.state[0] < capacity_of(call.k) && (!call.state[1] || call.state[0] >= call.k),
        "state: expected what an update left");
    if (call.storage == Storage::kFloat64) {
      take_in<double>(call);
    } else {
      take_in<float>(call);
    }
  }

 private:
  template <class Real>
  static void take_in(const TopKCall& call) {
    oodkern::update<Real>({call.storage, call.scores, call.sign, 0.0, false}, call.count, call.offset,
                          {static_cast<Real*>(call.values), call.indices, call.state, call.k, Real(call.sign)});
  }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("top_k_update", TORCH_BOX(&oodkern::top_k_update<oodkern::CpuTopK>));
}
