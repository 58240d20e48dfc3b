// Room `distill` on the CPU: T^2 KL(softmax(teacher / T) || softmax(student / T)) of given logits.
#include "../distill.h"

#include "dispatch.h"
#include "pages.h"

namespace oodkern {
namespace {

struct CpuDistill {
  static void run(const DistillCall& call, int64_t rows, const Tensor&) {
    over_rows(engines().distillation, call, rows, 2 * call.columns);
  }
  static void prepare(void* data, int64_t bytes) { prefer_large_pages(data, bytes); }
};

}  // namespace
}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CPU, m) {
  OODKERN_DISTILL_OPS(m, oodkern::CpuDistill);
}
