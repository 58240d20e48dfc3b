// Room `energy` on a GPU: E = -T logsumexp(z / T) and J = sum softplus(z) of given logits.
#include "../energy.h"
#include "row_launch.h"

namespace oodkern {
namespace {

struct CudaRows {
  static void run(const RowCall& call, int64_t rows, const Tensor& logits) {
    const CudaStream stream(logits);
    const int64_t splits = device::row_splits(call, rows, stream.multiprocessors());
    const Tensor partials = empty_of(logits, {splits > 1 ? rows * splits * 2 : 0}, score_dtype(logits));
    void* states = partials.mutable_data_ptr();
    if (call.reduction == Reduction::kLogSumExp) {
      device::run_rows<LogSumExp>(stream, call, rows, splits, states);
    } else {
      device::run_rows<SoftplusSum>(stream, call, rows, splits, states);
    }
  }
  static void prepare(void*, int64_t) {}
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  OODKERN_ENERGY_OPS(m, oodkern::CudaRows);
}
