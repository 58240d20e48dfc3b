// The engines of one instruction set. Compiled once per instruction set.
#include "../engines.h"

namespace oodkern::OODKERN_ISA {

void run_rows(const RowCall&, int64_t, int64_t);
extern const TileEngine tile_engine;
void run_heads(const HeadCall&, int64_t, int64_t);
extern const NormEngine norm_engine;
void run_distillation(const DistillCall&, int64_t, int64_t);
extern const ClubEngine club_engine;
extern const ScanEngine scan_engine;
void run_seeds(const SeedCall&, int64_t, int64_t);

const Engines& engines() {
  static const Engines all = {run_rows,         tile_engine, run_heads,   norm_engine,
                              run_distillation, club_engine, scan_engine, run_seeds};
  return all;
}

}  // namespace oodkern::OODKERN_ISA
