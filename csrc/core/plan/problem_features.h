// Defines the features by which measurements and rules tell problems apart. A rule is a box of
// these features. Both tables of rules are data, kernels/*_rules.csv, which the build turns into
// C++.
#pragma once

#include <cstdint>
#include <optional>

#include "../integers.h"
#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

constexpr int64_t kMax = INT64_MAX;

struct Range {
  int64_t low, high;  // Both ends are included.
  bool holds(int64_t value) const { return low <= value && value <= high; }
};

// Holds the features of a problem and of the kernel that runs it by default.
struct Features {
  Op op;
  Layout layout;
  // These are the buckets of the kernel.
  int16_t head_dim, head_dim_v;
  Mask mask;
  // GQA and MQA are grouped.
  bool grouped;
  Peer peer;
  // A sequence has this many rows of q; with varlen, on average.
  int64_t queries;
  // With varlen, this is the number of keys of the longest sequence.
  int64_t keys;
  int64_t batch;
  // These are the query rows that a sequence computes in whole tiles of a rule, in per cent of
  // those that it computes in whole default tiles.
  int64_t rows;
  // These are the default tile's query tiles of all heads and sequences, per 100 SMs.
  int64_t tiles;
};

// A rule holds for the problems whose features lie in its ranges. A selector without a value
// selects everything, but for a bias: no problem with one was measured for the rules of any mask.
struct Rule {
  Op op;
  Layout layout;
  int16_t head_dim;
  std::optional<Mask> mask;
  std::optional<bool> grouped;
  std::optional<int16_t> head_dim_v;
  std::optional<Peer> peer;
  Range queries, keys, batch, rows, tiles;

  bool same_kind(const Features& f) const {
    return op == f.op && layout == f.layout && head_dim == f.head_dim &&
           (mask ? *mask == f.mask : f.mask != Mask::kBias) &&
           (!grouped || *grouped == f.grouped) && (!head_dim_v || *head_dim_v == f.head_dim_v) &&
           (!peer || *peer == f.peer);
  }
  bool holds(const Features& f) const {
    return same_kind(f) && queries.holds(f.queries) && keys.holds(f.keys) && batch.holds(f.batch) &&
           rows.holds(f.rows) && tiles.holds(f.tiles);
  }
};

// Returns the rows of a sequence's queries in whole tiles.
inline int64_t rows_in_tiles(int64_t queries, int64_t tile) {
  return ceil_div(queries, tile) * tile;
}

inline Features features(const Problem& p, const Kernel& kernel) {
  const int64_t queries = p.layout == Layout::kVarlen ? p.total_q / p.batch : p.seqlen_q;
  const int64_t tiles = p.sm_count > 0 ? bounded_product(100, p.batch, p.num_heads,
                                                         ceil_div(queries, kernel.block_m)) /
                                             p.sm_count
                                       : kMax;
  // Measurements tell decoding from other forwards, and nothing else about the kernel.
  return {kernel.op == Op::kDecode ? kernel.op : p.op,
          p.layout,
          kernel.head_dim,
          kernel.head_dim_v,
          kernel.mask,
          p.num_heads != p.num_heads_kv,
          p.peer,
          queries,
          p.seqlen_k,
          p.batch,
          /*rows=*/100,
          tiles};
}

}  // namespace fa4
