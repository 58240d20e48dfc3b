// What every build of the engines has, one line each. A build is an instruction set's (see cpu/simd).
#pragma once

#include "club.h"
#include "distill.h"
#include "heads.h"
#include "norm.h"
#include "rows.h"
#include "scan.h"
#include "seeds.h"
#include "tiles.h"

namespace oodkern {

struct Engines {
  RowEngine rows;
  TileEngine tiles;
  HeadEngine heads;
  NormEngine norms;
  DistillEngine distillation;
  ClubEngine club;
  ScanEngine scans;
  SeedEngine seeds;
};

}  // namespace oodkern
