// Which of the row engine's builds this processor runs.
#pragma once

#include "rows.h"

namespace oodkern {

RowEngine row_engine();

}  // namespace oodkern
