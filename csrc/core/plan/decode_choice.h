// The forward of few queries: when the decode kernel runs, and over how many thread blocks it
// splits the keys.
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Beyond, tiles are as many as the forward's.
constexpr int64_t kMaxDecodeRows = 4096;
// Longer sequences keep their bits whatever else is in the batch, which decides the splits.
constexpr int64_t kMaxDecodeQueries = 512;

// Rows of its tiles that a sequence has for each key/value head: queries times the query heads that
// share it.
int64_t decode_rows(const Problem& problem);

// The decode kernel of a forward where it pays, compared with the kernel that runs it otherwise; or
// null. `left` and `right`, here and below: the mask's bounds, kUnbounded for none.
const Kernel* find_decode(const Problem& problem, int32_t left, int32_t right,
                          const Kernel& forward);

// Thread blocks that share the keys of a tile: problem.num_splits where it is given, up to what a
// cluster holds.
int32_t decode_splits(const Problem& problem, int32_t left, int32_t right, const Kernel& kernel);

}  // namespace fa4
