#include "persistent.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "integers.h"

namespace fa4 {
namespace {

constexpr int64_t kMostCursors = int64_t{1} << 30;
// Query heads on one of keys, from which on no head need be paired: longest first, neighbours that share keys read them at the same
// time, and L2 need not keep them. With 4 and with 8 the choice came 0.6% and 0.4% nearer to the fastest dealing, in geometric
// mean, with 2 it went 0.3% away.
constexpr int64_t kManyShareKeys = 4;

// A dense sequence's; of all packed sequences, which may each fill their last one in part, at most.
int64_t blocks_a_head(const Problem& p, const Kernel& kernel) {
  return p.layout == Layout::kVarlen ? p.total_q / kernel.block_m + p.batch : ceil_div(p.seqlen_q, kernel.block_m);
}

// The tiles of a dense, causal problem and what they cost, in keys. What a tile costs beside them is left out: of 577 problems that
// were measured with up to 13 dealings each the choice is 1.009 from the fastest in geometric mean, and as near with 48 to 256 keys
// more a tile.
struct Tiles {
  const Problem& p;
  const Kernel& kernel;
  int64_t heads = p.batch * p.num_heads;
  int64_t blocks = blocks_a_head(p, kernel);
  int64_t units = ceil_div(blocks, 2);  // of a head: pairs, and what has no other

  int64_t cost(int64_t block) const {
    const int64_t last_row = std::min((block + 1) * kernel.block_m, p.seqlen_q);
    return std::max<int64_t>(last_row + p.seqlen_k - p.seqlen_q, 0);
  }

  // What is not paired is dealt out longest first, to and fro: who has most of it is first, in the middle, last, or the last who
  // gets a tile more than the others.
  int64_t busiest(const Dealing& dealing) const {
    const int64_t workers = dealing.workers, rest = heads - dealing.paired, count = rest * blocks;
    const int64_t pair = cost(blocks - 1) + (blocks > 1 ? cost(0) : 0);
    int64_t most = 0;
    for (int64_t worker : {int64_t{0}, workers / 2, workers - 1, last_with_more(count, workers)}) {
      int64_t load = 0;
      for (int64_t first = 0; first < count; first += 2 * workers) {
        for (int64_t tile : {first + worker, first + 2 * workers - 1 - worker}) {
          if (tile < count) load += cost(blocks - 1 - tile / rest);
        }
      }
      most = std::max(most, load);
    }
    return ceil_div(dealing.paired * units, workers) * pair + most;
  }

  static int64_t last_with_more(int64_t count, int64_t workers) {
    const int64_t more = count % workers;
    if (more == 0) return 0;
    return count / workers % 2 == 0 ? more - 1 : workers - more;
  }
};

}  // namespace

bool fits_cursors(const Problem& p, const Kernel& kernel) {
  return (p.layout == Layout::kVarlen ? 1 : p.batch) * p.num_heads <= kMostCursors / blocks_a_head(p, kernel);
}

Dealing deal(const Problem& p, const Kernel& kernel, int32_t multiprocessors) {
  const Tiles tiles{p, kernel};
  const int64_t heads = tiles.heads, units = tiles.units;
  const auto leave = [&](int64_t rounds) { return std::max<int64_t>(heads * units - rounds * multiprocessors, 0) / units; };
  const int64_t even = multiprocessors / std::gcd<int64_t>(multiprocessors, units);
  const int64_t with_a_round = leave(1) / even * even;
  const bool many_share_keys = p.num_heads >= kManyShareKeys * p.num_heads_kv;
  // Whole rounds would leave more heads than L2 holds keys of: two rounds are enough to even out what pairs leave uneven.
  if (!many_share_keys && (heads - with_a_round) * units > 4 * multiprocessors) {
    return {multiprocessors, static_cast<int32_t>(leave(2))};
  }
  const int64_t rounds = ceil_div(heads * units, multiprocessors);
  const auto with_load = [&](int64_t workers, int64_t paired) {
    const Dealing dealing{static_cast<int32_t>(workers), static_cast<int32_t>(paired)};
    return std::pair(tiles.busiest(dealing), dealing);
  };
  const auto all = with_load(ceil_div(heads * units, rounds), heads);
  const auto whole_rounds = with_load(multiprocessors, leave(0) / even * even);
  const auto one_less = with_load(multiprocessors, with_a_round);
  const auto none = many_share_keys ? with_load(multiprocessors, 0) : one_less;
  // Of equals the first: what is not paired works on all of its heads at once, and misses L2.
  return std::min({all, whole_rounds, one_less, none}, [](const auto& a, const auto& b) { return a.first < b.first; }).second;
}

int32_t in_turns(const Problem& p, const Kernel& kernel, int32_t multiprocessors) {
  const int64_t blocks = blocks_a_head(p, kernel), tiles = p.batch * p.num_heads * blocks;
  // Who has a tile more than the others decides, and of fewer thread blocks than a head has tiles all might have last ones.
  if (p.seqlen_q % kernel.block_m == 0 || tiles % multiprocessors < blocks) return multiprocessors;
  const int64_t rounds = ceil_div(tiles, multiprocessors);
  for (int64_t workers = multiprocessors; ceil_div(tiles, workers) == rounds; --workers) {
    if (std::gcd(workers, blocks) == 1) return static_cast<int32_t>(workers);
  }
  return multiprocessors;
}

}  // namespace fa4
