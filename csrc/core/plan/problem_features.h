// What measurements tell problems apart by: features of the speed rules and of the tile rules.
#pragma once

#include <cstdint>

#include "../integers.h"
#include "problem.h"

namespace fa4 {

constexpr int64_t kMax = INT64_MAX;

struct Range {
  int64_t low, high;  // both included
  bool holds(int64_t value) const { return low <= value && value <= high; }
};

// Rows of q a sequence; varlen: on average.
inline int64_t queries_a_sequence(const Problem& p) {
  return p.layout == Layout::kVarlen ? p.total_q / p.batch : p.seqlen_q;
}

// Query tiles of all heads and sequences, per 100 multiprocessors.
inline int64_t tiles_per_100(const Problem& p, int64_t tiles_a_head) {
  return p.sm_count > 0 ? bounded_product(100, p.batch, p.num_heads, tiles_a_head) / p.sm_count
                        : kMax;
}

}  // namespace fa4
