// Room `select` on a GPU: the k best of a stream of scores.
#include "top_k.cuh"

#include "host.h"

namespace oodkern {
namespace {

constexpr int64_t kScoresOfUpdate = 1 << 15;  // for each multiprocessor; more are taken in one after the other
constexpr int64_t kBlocksAtOnce = 8;          // that a multiprocessor runs
constexpr int64_t kEach = 8;                  // candidates that are worth a thread

struct CudaTopK {
  static void update(const TopKCall& call, const Tensor& scores) {
    if (call.count == 0) return;
    switch (call.storage) {
      case Storage::kFloat64: return take_in<double, double>(call, scores);
      case Storage::kFloat32: return take_in<float, float>(call, scores);
      case Storage::kBFloat16: return take_in<device::BFloat16, float>(call, scores);
      case Storage::kFloat16: return take_in<device::Float16, float>(call, scores);
    }
  }

 private:
  template <class Stored, class Real>
  static void take_in(const TopKCall& call, const Tensor& scores) {
    const CudaStream stream(scores);
    const int64_t most = kScoresOfUpdate * stream.multiprocessors();
    const int64_t capacity = capacity_of(call.k), room = capacity + std::min(call.count, most);
    const Tensor pool_values = empty_of(scores, {room}, score_dtype(scores));
    const Tensor pool_indices = empty_of(scores, {room}, ScalarType::Long);
    const Tensor control = empty_of(scores, {int64_t(sizeof(device::Control) / 8)}, ScalarType::Long);
    const device::Pool<Real> pool{static_cast<Real*>(pool_values.mutable_data_ptr()),
                                  static_cast<int64_t*>(pool_indices.mutable_data_ptr()),
                                  static_cast<device::Control*>(control.mutable_data_ptr()),
                                  call.k,
                                  capacity,
                                  Real(call.sign)};
    Real* values = static_cast<Real*>(call.values);
    const int64_t each = device::kThreads * kEach;
    const int64_t blocks = std::min((room + each - 1) / each, kBlocksAtOnce * stream.multiprocessors());
    const auto launch = [&](const char* name, auto kernel, auto... arguments) {
      stream.launch(name, kernel, blocks, device::kThreads, 0, pool, arguments...);
    };
    for (int64_t first = 0; first < call.count; first += most) {
      const int64_t count = std::min(call.count - first, most);
      const Stored* part = static_cast<const Stored*>(call.scores) + first;
      launch("start_update", device::start_update<Real>, call.state);
      launch("sift", device::sift<Stored, Real>, part, count, call.offset + first, values, call.indices, call.state);
      for (int digit = 0; digit < device::kScoreDigits<Real> + device::kIndexDigits; ++digit) {
        launch("count_digits", device::count_digits<Real>, digit);
      }
      launch("place_best", device::place_best<Real>, values, call.indices, call.state);
    }
  }
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  m.impl("top_k_update", TORCH_BOX(&oodkern::top_k_update<oodkern::CudaTopK>));
}
