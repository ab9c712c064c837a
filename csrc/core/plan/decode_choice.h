// The forward of few queries: when the decode kernel runs, and over how many CTAs it splits the
// keys.
#pragma once

#include <string>

#include "kernel_set.h"
#include "kernel_table.h"
#include "overrides.h"
#include "problem.h"

namespace fa4 {

// With more rows, the decode kernel has about as many tiles as the forward.
constexpr int64_t kMaxDecodeRows = 4096;
// Where the planner decodes, the rest of the batch decides the number of splits, and so the bits of
// a result. Longer sequences run the forward, which splits no keys, but whose tile a tile rule may
// choose by the rest of the batch. With num_splits=1 nothing that decides bits depends on it.
constexpr int64_t kMaxDecodeQueries = 512;

// The tile rows of a sequence per key/value head: its queries times the query heads that share the
// head.
int64_t decode_rows(const Problem& problem);

// Where decoding is supported, in words that go behind "is supported", for a forward or backward
// that runs on `kernel` because no decode kernel can run it.
std::string decode_limit(const Problem& problem, const Kernel& kernel, const Overrides& overrides,
                         const KernelSet& disabled);

// The decode kernel for a problem that `forward` runs otherwise, where it pays or where `where`
// asks for it; null elsewhere. Without a `forward` it runs wherever it can.
const Kernel* choose_decode(const Problem& problem, const ResolvedMask& mask, const Kernel* forward,
                            Decode where, const KernelSet& disabled);

// The CTAs that share the keys of a tile: problem.num_splits where it is given, up to what a
// cluster holds.
int32_t decode_splits(const Problem& problem, const ResolvedMask& mask, const Kernel& kernel);

}  // namespace fa4
