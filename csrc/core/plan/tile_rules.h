// Some problems were measured to run faster on another tile than the default:
// kernels/tile_rules.csv.
#pragma once

#include <vector>

#include "kernel_table.h"
#include "problem.h"
#include "problem_features.h"

namespace fa4 {

// Where the rule holds, its tile is faster than the default tile.
struct TileRule {
  Rule where;
  Tile tile;
  // The tile was also faster than the stock kernel, on every problem that was measured.
  bool beats_stock;
};

// The rules are never destroyed, because a call may read them while the process exits.
extern const std::vector<TileRule>& kTileRules;

// Returns the first rule that holds for a problem which `kernel` runs by default, or null where
// none does.
const TileRule* find_tile_rule(const Problem& problem, const Kernel& kernel, Features features,
                               const std::vector<TileRule>& rules);

}  // namespace fa4
