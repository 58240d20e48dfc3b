// The engines of one instruction set. Compiled once per instruction set.
#include "../engines.h"

namespace oodkern::OODKERN_ISA {

void run_rows(const RowCall&, int64_t, int64_t);
extern const TileEngine tile_engine;

const Engines& engines() {
  static const Engines all = {run_rows, tile_engine};
  return all;
}

}  // namespace oodkern::OODKERN_ISA
