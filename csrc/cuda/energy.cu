// Room `energy` on a GPU: E = -T logsumexp(z / T) and J = sum softplus(z) of given logits.
#include "../energy.h"
#include "host.h"
#include "row_launch.h"

namespace oodkern {
namespace {

struct CudaRows {
  static void run(const RowCall& call, int64_t rows, const Tensor& logits) {
    const CudaStream stream(logits);
    const int64_t splits = device::row_splits(call, rows, stream.multiprocessors());
    const Tensor partials = empty_of(logits, {splits > 1 ? rows * splits * 2 : 0}, score_dtype(logits));
    const auto launch = [&](const char*, auto kernel, int64_t blocks, auto... arguments) {
      stream.launch(kernel, blocks, device::kThreads, arguments...);
    };
    void* states = partials.mutable_data_ptr();
    if (call.reduction == Reduction::kLogSumExp) {
      device::run_rows<LogSumExp>(call, rows, splits, states, launch);
    } else {
      device::run_rows<SoftplusSum>(call, rows, splits, states, launch);
    }
  }
  static void prepare(void*, int64_t) {}
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CUDA, m) {
  OODKERN_ENERGY_OPS(m, oodkern::CudaRows);
}
