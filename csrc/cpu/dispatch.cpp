// The engines are compiled once per instruction set (see cpu/simd); the best one that the processor has
// is chosen at load time. A test may choose another.
#include "dispatch.h"

#include <atomic>
#include <string>

#include "../stable.h"

namespace oodkern {

namespace baseline {
void run_rows(const RowCall&, int64_t, int64_t);
extern const TileEngine tile_engine;
}
#if defined(OODKERN_X86_64)
namespace avx2 {
void run_rows(const RowCall&, int64_t, int64_t);
extern const TileEngine tile_engine;
}
namespace avx512 {
void run_rows(const RowCall&, int64_t, int64_t);
extern const TileEngine tile_engine;
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  RowEngine rows;
  const TileEngine* tiles;
  bool supported;  // mirrors the compiler flags of the build
};

// Best last.
const InstructionSet kSets[] = {
    {"baseline", baseline::run_rows, &baseline::tile_engine, true},
#if defined(OODKERN_X86_64)
    {"avx2", avx2::run_rows, &avx2::tile_engine,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
    {"avx512", avx512::run_rows, &avx512::tile_engine,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl")},
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

RowEngine row_engine() {
  return set_in_use().load()->rows;
}

const TileEngine& tile_engine() {
  return *set_in_use().load()->tiles;
}

}  // namespace oodkern

STABLE_TORCH_LIBRARY_IMPL(oodkern, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&oodkern::instruction_sets));
  m.impl("instruction_set", TORCH_BOX(&oodkern::instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&oodkern::use_instruction_set));
}
