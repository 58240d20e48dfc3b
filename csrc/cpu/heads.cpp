// Room `heads` on the CPU: losses of given logits whose slopes are known with their values.
#include "../heads.h"

#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

struct CpuHeads {
  static void run(const HeadCall& call, int64_t rows, const Tensor&) {
    over_rows(engines().heads, call, rows, 2 * call.columns);  // of twice the work
  }
  static void prepare(void* data, int64_t bytes) { prefer_large_pages(data, bytes); }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  OODKERN_HEAD_OPS(m, oodkern::CpuHeads);
}
