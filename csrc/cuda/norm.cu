// Room `norm` on a GPU: the L2 norm of each row, its gradient and the gradient's gradient.
#include "../norm.h"

#include "row_launch.h"

namespace oodkern {
namespace {

struct CudaNorms {
  static void run(const RowCall& call, int64_t rows, const Tensor& x) { device::reduce<Norm>(call, rows, x); }
  static void prepare(void*, int64_t) {}
};

}  // namespace
}  // namespace oodkern

OODKERN_CUDA_OPS(m) {
  OODKERN_NORM_OPS(m, oodkern::CudaNorms);
}
