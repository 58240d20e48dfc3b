// Room `energy` on the CPU: E = -T logsumexp(z / T) and J = sum softplus(z) of given logits.
#include "../energy.h"
#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

struct CpuRows {
  static void run(const RowCall& call, int64_t rows, const Tensor&) {
    over_rows(engines().rows, call, rows, call.columns);
  }
  static void prepare(void* data, int64_t bytes) { prefer_large_pages(data, bytes); }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  OODKERN_ENERGY_OPS(m, oodkern::CpuRows);
}
