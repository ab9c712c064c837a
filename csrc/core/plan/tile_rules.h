// Problems that another tile than the default was measured to run faster. The rules are data:
// kernels/tile_rules.csv, which the build turns into kTileRules.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "problem.h"
#include "problem_features.h"

namespace fa4 {

// The tile is faster than the default's where all of these hold.
struct TileRule {
  Op op;
  Layout layout;
  int16_t head_dim;  // bucket, of query's and value's
  Mask mask;
  Range queries;  // rows a sequence; varlen: on average
  Range rows;     // of the tile's in whole tiles, per cent of those in the default's
  Range tiles;    // the default's query tiles of all heads and sequences, per 100 multiprocessors
  Tile tile;
  bool beats_stock;  // and the stock kernel, on every problem that was measured
};

extern const std::vector<TileRule>&
    kTileRules;  // for good, as all that a call reads while the process exits

// The first rule that holds for a problem which `kernel` runs by default; null: none.
const TileRule* find_tile_rule(const Problem& problem, const Kernel& kernel,
                               const std::vector<TileRule>& rules);

}  // namespace fa4
