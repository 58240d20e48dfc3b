// Extremes of clusters and the streaming top-k on any device: arguments checked, results allocated. An Engine brings
//   find(call, scores)     for cluster_extremes
//   update(call, scores)   for top_k_update
// where scores is a tensor of the device that computes.
#pragma once

#include <algorithm>

#include "check.h"

namespace oodkern {

struct ExtremesCall {
  Storage storage;
  const void* scores;      // [N] float64 or float32, dense
  const int64_t* cluster;  // [N], dense
  int64_t N, clusters, per_side;
  int64_t* lowest;   // [clusters, per_side]
  int64_t* highest;  // [clusters, per_side]
};

template <class Engine>
std::tuple<Tensor, Tensor> cluster_extremes(const Tensor& score, const Tensor& cluster, int64_t clusters,
                                            int64_t per_side) {
  const ScalarType dtype = score.scalar_type();
  STD_TORCH_CHECK(score.dim() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
                  "score: expected [N] float64 or float32");
  STD_TORCH_CHECK(sizes_of(cluster) == sizes_of(score) && cluster.scalar_type() == ScalarType::Long,
                  "cluster: expected one int64 a score");
  check_same_device(cluster, "cluster", score, "score");
  STD_TORCH_CHECK(clusters >= 0, "clusters: expected 0 or more, got ", clusters);
  STD_TORCH_CHECK(per_side >= 1, "per_side: expected 1 or more, got ", per_side);
  const Tensor scores = torch::stable::contiguous(score), labels = torch::stable::contiguous(cluster);
  Tensor lowest = empty_of(score, {clusters, per_side}, ScalarType::Long);
  Tensor highest = empty_of(score, {clusters, per_side}, ScalarType::Long);
  Engine::find({storage_of(score), scores.const_data_ptr(), static_cast<const int64_t*>(labels.const_data_ptr()),
                score.size(0), clusters, per_side, static_cast<int64_t*>(lowest.mutable_data_ptr()),
                static_cast<int64_t*>(highest.mutable_data_ptr())},
               score);
  return {lowest, highest};
}

constexpr int64_t kLeastSpare = 64;  // candidates beyond k, at least

inline int64_t capacity_of(int64_t k) {
  return k + std::max(k, kLeastSpare);
}

// The candidates, of which there are fewer than capacity_of(k), lie in tensors from one update to the next.
struct TopKCall {
  Storage storage;     // of the scores
  const void* scores;  // [count], dense: those of samples offset, offset + 1, ...
  int64_t count, offset, k;
  double sign;       // a large sign * score is better, then a low index: an order without ties
  void* values;      // [capacity_of(k)] Real
  int64_t* indices;  // [capacity_of(k)]
  int64_t* state;    // how many, whether number k - 1 is the worst of k, NaN so far
};

template <class Engine>
void top_k_update(const Tensor& scores, int64_t offset, int64_t k, bool largest, const Tensor& values,
                  const Tensor& indices, const Tensor& state) {
  STD_TORCH_CHECK(scores.dim() == 1 && is_floating(scores), "scores: expected [n] of a floating dtype");
  STD_TORCH_CHECK(k >= 1, "k: expected 1 or more, got ", k);
  const std::vector<int64_t> capacity{capacity_of(k)};
  STD_TORCH_CHECK(sizes_of(values) == capacity && values.scalar_type() == score_dtype(scores) && values.stride(0) == 1,
                  "values: expected ", capacity[0], " numbers in the dtype of scores");
  STD_TORCH_CHECK(sizes_of(indices) == capacity && indices.scalar_type() == ScalarType::Long && indices.stride(0) == 1,
                  "indices: expected ", capacity[0], " int64");
  STD_TORCH_CHECK(
      state.numel() == 3 && state.scalar_type() == ScalarType::Long && state.dim() == 1 && state.stride(0) == 1,
      "state: expected three int64");
  check_same_device(values, "values", scores, "scores");
  check_same_device(indices, "indices", scores, "scores");
  check_same_device(state, "state", scores, "scores");
  const Tensor dense = torch::stable::contiguous(scores);
  Engine::update({storage_of(scores), dense.const_data_ptr(), scores.size(0), offset, k, largest ? 1.0 : -1.0,
                  values.mutable_data_ptr(), static_cast<int64_t*>(indices.mutable_data_ptr()),
                  static_cast<int64_t*>(state.mutable_data_ptr())},
                 dense);
}

}  // namespace oodkern
