// Which of the engines' builds this processor runs.
#pragma once

#include "blas.h"
#include "rows.h"
#include "tiles.h"

namespace oodkern {

// The build of the engines in use: 0 baseline, 1 AVX2, 2 AVX-512.
int build_in_use();
RowEngine row_engine();
const TileEngine& tile_engine();
// The one of this storage that is not left to the BLAS; null for bfloat16 where it is widened first.
Product product_of(Storage storage);

}  // namespace oodkern
