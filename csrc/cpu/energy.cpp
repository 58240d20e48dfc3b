// Room `energy` on the CPU: E = -T logsumexp(z / T) and J = sum softplus(z) of given logits.
#include "../energy.h"
#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

// The least work that PyTorch's own element-wise kernels give a thread; here some 10 microseconds.
constexpr int64_t kGrainElements = 32768;

struct CpuRows {
  static void run(const RowCall& call, int64_t rows, const Tensor&) {
    const RowEngine engine = engines().rows;
    const int64_t grain = kGrainElements / (call.columns < 1 ? 1 : call.columns) + 1;
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { engine(call, begin, end); });
  }
  static void prepare(void* data, int64_t bytes) { prefer_large_pages(data, bytes); }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  OODKERN_ENERGY_OPS(m, oodkern::CpuRows);
}
