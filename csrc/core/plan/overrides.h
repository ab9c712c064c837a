// What measurements and tests decide in the planner's place. A call of the product has none.
#pragma once

#include <cstdint>

#include "problem.h"

namespace fa4 {

// How a persistent kernel's tiles are assigned to its CTAs. Under a causal mask or a bias the tiles
// of the first `paired_heads` heads, counted over all batch elements, go in pairs of a long and a
// short one, and those of the other heads longest first (LPT: longest processing time first).
struct TileSchedule {
  int32_t num_ctas = 0, paired_heads = 0;
  explicit operator bool() const { return num_ctas != 0 || paired_heads != 0; }
};

// Where a forward of few queries runs on the decode kernel.
enum class Decode : int8_t { kWhereFaster, kWherePossible, kWhereNeeded };

struct Overrides {
  Tile tile;              // only kernels with this tile run; none: the planner's choice
  TileSchedule schedule;  // where there is one to choose; none: the planner's choice
  Decode decode = Decode::kWhereFaster;  // kWhereFaster: the planner's choice
};

}  // namespace fa4
