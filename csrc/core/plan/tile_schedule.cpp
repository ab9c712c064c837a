#include "tile_schedule.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "../integers.h"

namespace fa4 {
namespace {

constexpr int64_t kMostCursors = int64_t{1} << 30;
// Query heads on one of keys, from which on no head need be paired: longest first, neighbours that
// share keys read them at the same time, and L2 need not keep them. With 4 and with 8 the choice is
// 0.2% and 0.3% nearer to the fastest dealing for it, in geometric mean; with 2 it would be 0.3%
// further away.
constexpr int64_t kManyShareKeys = 4;
// Tiles of a thread block from which on one more or less is nothing, and adding up what each gets
// would take milliseconds.
constexpr int64_t kManyTiles = int64_t{1} << 16;
// What a tile costs beside its keys, in keys: of 740 problems, measured with up to 13 dealings
// each, the choice is 1.005 from the fastest in geometric mean with 128 to 192, 1.006 with 64 and
// 1.008 with none.
constexpr int64_t kTileCost = 128;

// A dense sequence's; of all packed sequences, which may each fill their last one in part, at most.
int64_t blocks_a_head(const Problem& p, const Kernel& kernel) {
  return p.layout == Layout::kVarlen ? bounded_sum(p.total_q / kernel.block_m, p.batch)
                                     : ceil_div(p.seqlen_q, kernel.block_m);
}

// The tiles of a dense, causal problem and what they cost, in keys.
struct Tiles {
  const Problem& p;
  const Kernel& kernel;
  int64_t heads = p.batch * p.num_heads;
  int64_t blocks = blocks_a_head(p, kernel);
  int64_t units = ceil_div(blocks, 2);  // of a head: pairs, and what has no other

  int64_t cost(int64_t block) const {
    const int64_t last_row = std::min((block + 1) * kernel.block_m, p.seqlen_q);
    return std::max<int64_t>(last_row + p.seqlen_k - p.seqlen_q, 0) + kTileCost;
  }

  // A head's first unit, which holds the last rows, may cost less than the others, which all cost
  // the same. That counts where all thread blocks get some.
  int64_t busiest_with_pairs(const Dealing& dealing) const {
    const bool even = blocks % 2 == 0;
    const int64_t rounds = ceil_div(dealing.paired * units, dealing.workers);
    const int64_t first = cost(blocks - 1) + (even ? cost(0) : 0);
    const int64_t other = units > 1 ? cost(blocks - 2) + cost(even ? 1 : 0) : first;
    const int64_t firsts = std::gcd<int64_t>(dealing.workers, units) == 1 ? rounds / units : 0;
    return firsts * first + (rounds - firsts) * other;
  }

  // What is not paired is dealt out longest first, to and fro: who has most of it is first, in the
  // middle, last, or the last who gets a tile more than the others.
  int64_t busiest(const Dealing& dealing) const {
    const int64_t workers = dealing.workers, rest = heads - dealing.paired, count = rest * blocks;
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
    return busiest_with_pairs(dealing) + most;
  }

  static int64_t last_with_more(int64_t count, int64_t workers) {
    const int64_t more = count % workers;
    if (more == 0) return 0;
    return count / workers % 2 == 0 ? more - 1 : workers - more;
  }
};

// The most thread blocks that share no factor with a head's units: dealt out in turns, each gets
// some of every kind.
int32_t alternating(int64_t units, int32_t multiprocessors) {
  int32_t workers = multiprocessors;
  while (std::gcd<int64_t>(workers, units) != 1) --workers;
  return workers;
}

}  // namespace

bool fits_cursors(const Problem& p, const Kernel& kernel) {
  const int64_t batch = p.layout == Layout::kVarlen ? 1 : p.batch;
  return bounded_product(batch, p.num_heads, blocks_a_head(p, kernel)) <= kMostCursors;
}

Dealing deal(const Problem& p, const Kernel& kernel, int32_t multiprocessors) {
  const Tiles tiles{p, kernel};
  const int64_t heads = tiles.heads, units = tiles.units;
  const auto leave = [&](int64_t rounds) {
    return std::max<int64_t>(heads * units - rounds * multiprocessors, 0) / units;
  };
  const int64_t even = multiprocessors / std::gcd<int64_t>(multiprocessors, units);
  const int64_t with_a_round = leave(1) / even * even;
  const bool many_share_keys = p.num_heads >= kManyShareKeys * p.num_heads_kv;
  // Whole rounds would leave more heads than L2 holds keys of: two rounds are enough to even out
  // what pairs leave uneven.
  if (!many_share_keys && (heads - with_a_round) * units > int64_t{3} * multiprocessors) {
    return {multiprocessors, static_cast<int32_t>(leave(2))};
  }
  const int64_t rounds = ceil_div(heads * units, multiprocessors);
  if (many_share_keys && rounds > kManyTiles) return {multiprocessors, 0};
  const auto with_load = [&](int64_t workers, int64_t paired) {
    const Dealing dealing{static_cast<int32_t>(workers), static_cast<int32_t>(paired)};
    return std::pair(tiles.busiest(dealing), dealing);
  };
  const auto all = with_load(ceil_div(heads * units, rounds), heads);
  const auto alternate = with_load(alternating(units, multiprocessors), heads);
  const auto whole_rounds = with_load(multiprocessors, leave(0) / even * even);
  const auto one_less = with_load(multiprocessors, with_a_round);
  const auto none = many_share_keys ? with_load(multiprocessors, 0) : one_less;
  // Of equals the first: what is not paired works on all of its heads at once, and misses L2.
  return std::min({all, alternate, whole_rounds, one_less, none},
                  [](const auto& a, const auto& b) { return a.first < b.first; })
      .second;
}

int32_t in_turns(const Problem& p, const Kernel& kernel, int32_t multiprocessors) {
  const int64_t blocks = blocks_a_head(p, kernel), tiles = p.batch * p.num_heads * blocks;
  const int64_t rounds = ceil_div(tiles, multiprocessors);
  if (p.seqlen_q % kernel.block_m == 0) return static_cast<int32_t>(ceil_div(tiles, rounds));
  // Who has a tile more than the others decides, and of fewer thread blocks than a head has tiles
  // all might have last ones.
  if (tiles % multiprocessors < blocks || std::gcd<int64_t>(multiprocessors, blocks) == 1)
    return multiprocessors;
  for (int64_t workers = ceil_div(tiles, rounds); workers < multiprocessors; ++workers) {
    if (std::gcd(workers, blocks) == 1) return static_cast<int32_t>(workers);
  }
  return multiprocessors;
}

}  // namespace fa4
