// Room `select` on the CPU: greedy k-means++ among samples whose distances are held. Plain PyTorch makes a dozen calls
// a seed, each of which costs more than its numbers do.
#include "../check.h"
#include "dispatch.h"

namespace oodkern {
namespace {

// Distances that are worth a thread, some 100 microseconds: 442,368 take 48 with one thread and 36 with two.
constexpr int64_t kGrain = 1 << 20;

Tensor kmeans_seeds(const Tensor& distance, const Tensor& uniform) {
  const auto is_real = [](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
  };
  STD_TORCH_CHECK(distance.dim() == 2 && distance.size(0) == distance.size(1) && is_real(distance),
                  "distance: expected [N, N] float64 or float32");
  STD_TORCH_CHECK(distance.size(0) > 0, "distance: expected at least one sample");
  STD_TORCH_CHECK(uniform.dim() == 3 && is_real(uniform), "uniform: expected [k, R, candidates] float64 or float32");
  STD_TORCH_CHECK(uniform.size(0) > 0 && uniform.size(2) > 0, "uniform: expected at least one seed and one candidate");
  check_same_device(uniform, "uniform", distance, "distance");
  const Rows rows = as_rows(distance);
  const Tensor numbers = torch::stable::contiguous(uniform);
  const int64_t N = distance.size(0), k = uniform.size(0), restarts = uniform.size(1), candidates = uniform.size(2);
  Tensor seeds = empty_of(distance, {restarts, k}, ScalarType::Long);
  const SeedCall call{distance.scalar_type() == ScalarType::Double,
                      rows.data(),
                      rows.stride,
                      uniform.scalar_type() == ScalarType::Double,
                      numbers.const_data_ptr(),
                      N,
                      k,
                      restarts,
                      candidates,
                      static_cast<int64_t*>(seeds.mutable_data_ptr())};
  parallel_for(0, restarts, kGrain / (k * candidates * N) + 1,
               [&](int64_t begin, int64_t end) { engines().seeds(call, begin, end); });
  return seeds;
}

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  m.impl("kmeans_seeds", TORCH_BOX(&oodkern::kmeans_seeds));
}
