// Which of the engines' builds this processor runs.
#pragma once

#include "blas.h"
#include "norm.h"
#include "rows.h"
#include "tiles.h"

namespace oodkern {

RowEngine row_engine();
const TileEngine& tile_engine();
const NormEngine& norm_engine();
// The one of this storage that is not left to the BLAS; null for bfloat16 where it is widened first.
Product product_of(Storage storage);

}  // namespace oodkern
