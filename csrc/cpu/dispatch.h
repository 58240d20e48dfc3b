// Which of the engines' builds this processor runs.
#pragma once

#include "blas.h"
#include "rows.h"
#include "tiles.h"

namespace oodkern {

RowEngine row_engine();
const TileEngine& tile_engine();
BFloat16Product bfloat16_product();  // null where bfloat16 is widened first

}  // namespace oodkern
