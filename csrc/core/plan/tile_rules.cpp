#include "tile_rules.h"

namespace fa4 {

const TileRule* find_tile_rule(const Problem& p, const Kernel& kernel,
                               const std::vector<TileRule>& rules) {
  // What was measured: self-attention on Hopper, in any order of summation. With one split the
  // caller asks for a result that does not depend on the rest of the batch.
  if (kernel.arch != 90 || p.num_splits == 1 || p.seqlen_q != p.seqlen_k ||
      p.total_q != p.total_k || p.deterministic)
    return nullptr;
  const int64_t queries = queries_a_sequence(p);
  const auto tiles_a_head = [queries](int64_t block_m) { return ceil_div(queries, block_m); };
  const int64_t default_rows = tiles_a_head(kernel.block_m) * kernel.block_m;
  if (!default_rows) return nullptr;
  const int64_t tiles = tiles_per_100(p, tiles_a_head(kernel.block_m));
  for (const TileRule& rule : rules) {
    const bool same_kind = rule.op == kernel.op && rule.layout == kernel.layout &&
                           rule.head_dim == kernel.head_dim && rule.head_dim == kernel.head_dim_v &&
                           rule.mask == kernel.mask;
    if (!same_kind) continue;
    const int64_t rows = 100 * tiles_a_head(rule.tile.queries) * rule.tile.queries / default_rows;
    if (rule.queries.holds(queries) && rule.rows.holds(rows) && rule.tiles.holds(tiles))
      return &rule;
  }
  return nullptr;
}

}  // namespace fa4
