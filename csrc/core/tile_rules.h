// Problems that another tile than the default was measured to run faster: kernels/tile_rules.csv.
#pragma once

#include <vector>

#include "kernel_table.h"
#include "problem.h"
#include "problem_features.h"

namespace fa4 {

// The tile is faster than the default's where the rule holds.
struct TileRule {
  Rule where;
  Tile tile;
  bool beats_stock;  // and the stock kernel, on every problem that was measured
};

// It is never destroyed: a call reads it while the process exits.
extern const std::vector<TileRule>& kTileRules;

// The first rule that holds for a problem which `kernel` runs by default; null where none does.
const TileRule* find_tile_rule(const Problem& problem, const Kernel& kernel,
                               const std::vector<TileRule>& rules);

}  // namespace fa4
