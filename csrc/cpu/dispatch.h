// Which of the engines' builds this processor runs.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace oodkern {

RowEngine row_engine();
const TileEngine& tile_engine();

}  // namespace oodkern
