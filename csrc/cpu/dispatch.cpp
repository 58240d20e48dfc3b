// The engines are compiled once per instruction set (see cpu/simd); the best one that the processor has
// is chosen at load time. A test may choose another.
#include "dispatch.h"
#include "packed.h"

#include <atomic>
#include <string>

#include "../stable.h"

namespace oodkern {

namespace baseline {
const Engines& engines();
}
#if defined(OODKERN_X86_64)
namespace avx2 {
const Engines& engines();
}
namespace avx512 {
const Engines& engines();
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Engines& (*engines)();
  Product float32;   // or null, where the BLAS is faster
  Product bfloat16;  // or null
  bool supported;    // mirrors the compiler flags of the build
};

#if defined(OODKERN_X86_64)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best last. The last two differ from AVX-512 in products alone.
const InstructionSet kSets[] = {
    {"baseline", baseline::engines, nullptr, nullptr, true},
#if defined(OODKERN_X86_64)
    {"avx2", avx2::engines, nullptr, nullptr, has_avx2()},
    {"avx512", avx512::engines, nullptr, nullptr, has_avx512()},
    {"avx512_bf16", avx512::engines, prefers_packed() ? multiply_float32 : nullptr, multiply_bfloat16,
     has_avx512() && has_bfloat16_dot_products()},
    {"amx", avx512::engines, nullptr, bfloat16_product_of_blas(),
     has_avx512() && bfloat16_product_of_blas() != nullptr},
#endif
};

const InstructionSet* best_set() {
  const InstructionSet* best = kSets;
  for (const InstructionSet& set : kSets) {
    if (set.supported) best = &set;
  }
  return best;
}

std::atomic<const InstructionSet*>& set_in_use() {
  static std::atomic<const InstructionSet*> set{best_set()};
  return set;
}

std::string instruction_sets() {
  std::string names;
  for (const InstructionSet& set : kSets) {
    if (set.supported) names += (names.empty() ? "" : " ") + std::string(set.name);
  }
  return names;
}

std::string instruction_set() {
  return set_in_use().load()->name;
}

void use_instruction_set(std::string name) {
  for (const InstructionSet& set : kSets) {
    if (set.supported && name == set.name) {
      set_in_use() = &set;
      return;
    }
  }
  STD_TORCH_CHECK(false, "name: this processor runs ", instruction_sets(), ", got ", name);
}

}  // namespace

const Engines& engines() {
  return set_in_use().load()->engines();
}

Product product_of(Storage storage) {
  const InstructionSet& set = *set_in_use().load();
  return storage == Storage::kFloat32 ? set.float32 : storage == Storage::kBFloat16 ? set.bfloat16 : nullptr;
}

}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&oodkern::instruction_sets));
  m.impl("instruction_set", TORCH_BOX(&oodkern::instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&oodkern::use_instruction_set));
}
