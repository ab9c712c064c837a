#include "tile_rules.h"

namespace fa4 {

const TileRule* find_tile_rule(const Problem& p, const Kernel& kernel, Features f,
                               const std::vector<TileRule>& rules) {
  // The rules were measured for self-attention, with equal head dims and in any order of
  // summation. With one split, the caller asks for a result that does not depend on the rest of the
  // batch.
  if (kernel.head_dim != kernel.head_dim_v || p.num_splits == 1 || p.seqlen_q != p.seqlen_k ||
      p.total_q != p.total_k || p.deterministic)
    return nullptr;
  const int64_t default_rows = rows_in_tiles(f.queries, kernel.block_m);
  if (!default_rows) return nullptr;
  for (const TileRule& rule : rules) {
    // Most rules are of another kind, and the division below takes time.
    if (!rule.where.same_kind(f)) continue;
    f.rows = 100 * rows_in_tiles(f.queries, rule.tile.queries) / default_rows;
    if (rule.where.holds(f)) return &rule;
  }
  return nullptr;
}

}  // namespace fa4
