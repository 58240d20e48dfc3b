// Which of the engines' builds this processor runs.
#pragma once

#include "../stable.h"
#include "blas.h"
#include "engines.h"

namespace oodkern {

const Engines& engines();  // of the instruction set in use
inline const TileEngine& tile_engine() {
  return engines().tiles;
}
// The least work that PyTorch's own element-wise kernels give a thread, in numbers; here some 10 microseconds.
constexpr int64_t kGrainElements = 32768;
inline int64_t grain_of(int64_t numbers) {  // rows of so many
  return kGrainElements / (numbers < 1 ? 1 : numbers) + 1;
}
template <class Call>
void over_rows(void (*engine)(const Call&, int64_t, int64_t), const Call& call, int64_t rows, int64_t numbers) {
  parallel_for(0, rows, grain_of(numbers), [&](int64_t begin, int64_t end) { engine(call, begin, end); });
}

// The one of this storage that is not left to the BLAS; null for bfloat16 where it is widened first.
Product product_of(Storage storage);

}  // namespace oodkern
