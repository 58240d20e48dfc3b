// The engine is compiled once per instruction set (see cpu/simd); the best one that the processor has
// is chosen at load time. A test may choose another.
#include "dispatch.h"

#include <atomic>

#include "../stable.h"

namespace oodkern {

namespace baseline {
void run_rows(const RowCall&, int64_t, int64_t);
}
#if defined(OODKERN_X86_64)
namespace avx2 {
void run_rows(const RowCall&, int64_t, int64_t);
}
namespace avx512 {
void run_rows(const RowCall&, int64_t, int64_t);
}
#endif

namespace {

// In the order of the build's list, best last; the conditions mirror the compiler flags of the build.
constexpr RowEngine kEngines[] = {
    baseline::run_rows,
#if defined(OODKERN_X86_64)
    avx2::run_rows,
    avx512::run_rows,
#endif
};

int64_t best_instruction_set() {
#if defined(OODKERN_X86_64)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 ? (avx512 ? 2 : 1) : 0;
#else
  return 0;
#endif
}

std::atomic<int64_t>& instruction_set() {
  static std::atomic<int64_t> index{best_instruction_set()};
  return index;
}

int64_t use_instruction_set(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index <= best_instruction_set(), "index: this processor runs instruction sets 0 to ",
                  best_instruction_set(), ", got ", index);
  return instruction_set().exchange(index);
}

}  // namespace

RowEngine row_engine() {
  return kEngines[instruction_set().load()];
}

}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CompositeExplicitAutograd, m) {
  m.impl("use_instruction_set", TORCH_BOX(&oodkern::use_instruction_set));
}
