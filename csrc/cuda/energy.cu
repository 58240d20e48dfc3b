// Room `energy` on a GPU: E = -T logsumexp(z / T) and J = sum softplus(z) of given logits.
#include "../energy.h"
#include "row_launch.h"

namespace oodkern {
namespace {

struct CudaRows {
  static void run(const RowCall& call, int64_t rows, const Tensor& logits) {
    if (call.reduction == Reduction::kLogSumExp) {
      device::reduce<LogSumExp>(call, rows, logits);
    } else {
      device::reduce<SoftplusSum>(call, rows, logits);
    }
  }
  static void prepare(void*, int64_t) {}
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  OODKERN_ENERGY_OPS(m, oodkern::CudaRows);
}
