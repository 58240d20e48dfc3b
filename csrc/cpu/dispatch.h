// Which of the engines' builds this processor runs.
#pragma once

#include "blas.h"
#include "engines.h"

namespace oodkern {

const Engines& engines();  // of the instruction set in use
inline const TileEngine& tile_engine() {
  return engines().tiles;
}
// The one of this storage that is not left to the BLAS; null for bfloat16 where it is widened first.
Product product_of(Storage storage);

}  // namespace oodkern
