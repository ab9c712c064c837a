// Runs the planner and the strides of results on random and extreme problems. The address and
// undefined-behaviour sanitizers, with which it is built, end the program at the first fault; what
// a plan must hold is checked here. `make sanitize` builds and runs it.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "aten/strides.h"
#include "core/error.h"
#include "core/integers.h"
#include "core/plan/plan.h"

namespace fa4 {
namespace {

// This type holds every product of a plan's numbers.
using Wide = __int128;

constexpr int kProblems = 500'000, kShapes = 500'000;

constexpr int64_t kExtremes[] = {
    INT64_MIN,
    INT64_MIN + 1,
    -(int64_t{1} << 32),
    -(int64_t{1} << 31) - 1,
    -(int64_t{1} << 31),
    -1024,
    -9,
    -8,
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    63,
    64,
    127,
    128,
    129,
    255,
    256,
    257,
    264,
    512,
    513,
    4096,
    65'535,
    65'536,
    70'001,
    (1 << 24) - 1,
    1 << 24,
    (1 << 30) - 257,
    (1 << 30) - 1,
    1 << 30,
    (1 << 30) + 1,
    INT32_MAX - 1,
    INT32_MAX,
    int64_t{INT32_MAX} + 1,
    int64_t{UINT32_MAX},
    int64_t{1} << 32,
    int64_t{1} << 40,
    (int64_t{1} << 53) + 1,
    (int64_t{1} << 61) + 8,
    (int64_t{1} << 62) - 1,
    int64_t{1} << 62,
    (int64_t{1} << 62) + 8,
    INT64_MAX - 255,
    INT64_MAX - 7,
    INT64_MAX - 1,
    INT64_MAX,
};
constexpr int32_t kExtremes32[] = {
    INT32_MIN, -1, 0, 1, 2, 64, 128, 132, 148, 1 << 20, 1 << 30, INT32_MAX - 1, INT32_MAX};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  // Draws every order of magnitude equally often.
  int64_t up_to(int64_t most) {
    int bits = 0;
    while (most >> bits > 1) ++bits;
    return std::min(most, between(1, int64_t{1} << between(0, bits)));
  }
  template <class T, size_t kCount>
  T of(const T (&values)[kCount]) {
    return values[static_cast<size_t>(between(0, kCount - 1))];
  }

 private:
  std::mt19937_64 engine_;
};

constexpr Op kOps[] = {
    Op::kForward,      Op::kDecode,     Op::kBackward, Op::kBackwardGroups, Op::kBackwardQueries,
    Op::kBackwardKeys, Op::kMapQueries, Op::kMapKeys,  Op::kPreprocess,     Op::kPostprocess};
constexpr Dtype kDtypes[] = {Dtype::kBf16, Dtype::kFp16};
constexpr Layout kLayouts[] = {Layout::kDense, Layout::kVarlen, Layout::kPaged, Layout::kAny};
constexpr Decode kDecodes[] = {Decode::kWhereFaster, Decode::kWherePossible, Decode::kWhereNeeded};
constexpr int32_t kCapabilities[] = {90, 90, 100, 103}, kSmCounts[] = {132, 132, 148, 114, 16, 1};
constexpr Tile kTiles[] = {
    {64, 64}, {128, 128}, {128, 64}, {192, 128}, {64, 128}, {-1, 0}, {INT32_MAX, INT32_MIN}};

constexpr const char* kPatterns[] = {"sm90_forward_*", "*_decode_*", "*_gqa_*", "*_d128_*",
                                     "*_preprocess_*", "*_clear_*",  "sm100_*", "*_m64n128",
                                     "*_bias_*",       "*_map_*"};

struct Asked {
  Problem problem;
  Overrides overrides;
  KernelSet disabled;
};

// Draws none in most cases, as in most programs.
KernelSet disabled_kernels(Random& random) {
  KernelSet disabled;
  if (!random.one_in(4)) return disabled;
  for (int64_t n = random.between(1, 3); n > 0; --n) disabled.add(random.of(kPatterns));
  return disabled;
}

// Gives most of these problems a bias that kernels take.
void give_bias(Problem& p, Random& random) {
  p.bias = true;
  if (!random.one_in(8)) {
    p.capability = 90;
    p.is_causal = p.keys_in_use = false;
    p.window_size_left = p.window_size_right = -1;
    p.page_size = p.num_splits = 0;
  }
  if (random.one_in(2)) p.bias_batch = p.batch;
  if (random.one_in(2)) p.bias_heads = p.num_heads;
  p.bias_by_query = random.one_in(2);
}

// Draws a problem that a program may well ask for.
Asked realistic(Random& random) {
  Problem p;
  p.op = random.one_in(2) ? Op::kForward : Op::kBackward;
  p.capability = random.of(kCapabilities);
  p.sm_count = random.of(kSmCounts);
  p.dtype = random.of(kDtypes);
  p.layout = random.one_in(2) ? Layout::kDense : Layout::kVarlen;
  p.batch = random.up_to(300);
  p.seqlen_q = random.up_to(1 << 18);
  p.seqlen_k = random.one_in(2) ? p.seqlen_q : random.up_to(1 << 18);
  const bool dense = p.layout == Layout::kDense;
  p.total_q = dense ? p.batch * p.seqlen_q : random.between(p.seqlen_q, p.batch * p.seqlen_q);
  p.total_k = dense ? p.batch * p.seqlen_k : random.between(p.seqlen_k, p.batch * p.seqlen_k);
  p.num_heads_kv = random.up_to(32);
  p.num_heads = p.num_heads_kv * random.up_to(16);
  p.head_dim = 8 * random.between(1, 32);
  p.head_dim_v = random.one_in(3) ? 8 * random.between(1, 32) : p.head_dim;
  p.is_causal = random.one_in(2);
  if (random.one_in(4)) p.window_size_left = random.up_to(4096);
  if (random.one_in(4)) p.window_size_right = random.up_to(4096);
  p.deterministic = random.one_in(4);
  if (random.one_in(2)) p.peer = Peer::kCudnn;
  if (!dense && random.one_in(4)) p.page_size = 16 * random.up_to(32);
  p.keys_in_use = dense && random.one_in(8);
  if (random.one_in(4)) p.num_splits = random.up_to(32);
  if (random.one_in(4)) give_bias(p, random);
  Overrides overrides;
  overrides.decode = random.of(kDecodes);
  if (random.one_in(8)) overrides.tile = random.of(kTiles);
  if (random.one_in(8))
    overrides.schedule = {static_cast<int32_t>(random.up_to(200)),
                          static_cast<int32_t>(random.up_to(5000)) - 1};
  return {p, overrides, disabled_kernels(random)};
}

// Puts an extreme value in the place of a field.
void make_extreme(Asked& asked, Random& random) {
  Problem& p = asked.problem;
  int64_t Problem::* const numbers[] = {
      &Problem::batch,
      &Problem::seqlen_q,
      &Problem::seqlen_k,
      &Problem::total_q,
      &Problem::total_k,
      &Problem::num_heads,
      &Problem::num_heads_kv,
      &Problem::head_dim,
      &Problem::head_dim_v,
      &Problem::window_size_left,
      &Problem::window_size_right,
      &Problem::page_size,
      &Problem::num_splits,
      &Problem::bias_batch,
      &Problem::bias_heads,
  };
  switch (random.between(0, 20)) {
    case 0:
      p.op = random.of(kOps);
      break;
    case 1:
      p.layout = random.of(kLayouts);
      break;
    case 2:
      p.sm_count = random.of(kExtremes32);
      break;
    case 3:
      p.capability = random.of(kExtremes32);
      break;
    case 4:
      asked.overrides.schedule = {random.of(kExtremes32), random.of(kExtremes32)};
      break;
    // The heads keep a ratio that kernels take.
    case 5:
      p.num_heads = p.num_heads_kv = random.of(kExtremes);
      break;
    // A caller may give these lengths alike.
    case 6:
      p.total_q = p.total_k = p.seqlen_q = p.seqlen_k = random.of(kExtremes);
      break;
    case 7:
      p.bias = true;
      break;
    default:
      p.*random.of(numbers) = random.of(kExtremes);
  }
}

void expect(bool holds, const char* what) {
  if (!holds) fail("it does not hold that ", what);
}

// Checks that parts of a workspace come one after the other, each aligned.
class Ends {
 public:
  void follows(int64_t offset, Wide elements) {  // of four bytes
    expect(offset >= end_ && offset - end_ < 256, "a part begins where the one before it ends");
    expect(offset % 256 == 0, "a part is aligned to 256 bytes");
    end_ = offset + 4 * elements;
  }
  void start_again() { end_ = 0; }
  Wide end() const { return end_; }

 private:
  Wide end_ = 0;
};

Wide tiles(int64_t length, int64_t tile) { return (Wide{length} + tile - 1) / tile; }

// Checks that the maps of a bias follow the other parts: the cells, and lists for each query tile
// and, in a backward, each key block.
void check_maps(const Problem& p, const Plan& plan, Ends& ends) {
  if (plan.kernel->mask != Mask::kBias) return;
  const Workspace& w = plan.workspace;
  const Wide biases = Wide{p.bias_batch} * p.bias_heads;
  const auto list = [&](Wide count, Wide entries) { return biases * count * (4 + entries); };
  const auto rows = [&](int64_t tile) { return p.bias_by_query ? tiles(p.seqlen_q, tile) : 1; };
  ends.follows(w.cells, biases * rows(64) * tiles(p.seqlen_k, 64));
  const Kernel& queries = kKernels[plan.kernel->map_queries];
  expect(queries.op == Op::kMapQueries, "the map of queries is there");
  ends.follows(w.lists_q, list(rows(queries.block_m), tiles(p.seqlen_k, queries.block_n)));
  if (p.op == Op::kForward) return;
  const Kernel& keys = kKernels[plan.kernel->map_keys];
  expect(keys.op == Op::kMapKeys, "the map of keys is there");
  ends.follows(w.lists_k, list(tiles(p.seqlen_k, keys.block_n), tiles(p.seqlen_q, keys.block_m)));
}

void check_nothing_is_cleared(const Workspace& w, const Ends& ends) {
  expect(w.bytes >= ends.end() && w.bytes - ends.end() < 256, "the parts fill the workspace");
  expect(w.zeroed == w.bytes && !w.numbers_in_dq, "nothing is cleared");
}

// Checks that the scratch memory of a backward in two passes holds delta and the maps of a bias,
// and nothing else.
void check_two_pass_workspace(const Problem& p, const Plan& plan) {
  const Workspace& w = plan.workspace;
  const Wide rows = p.layout == Layout::kVarlen ? Wide{p.total_q} : Wide{p.batch} * p.seqlen_q;
  Ends ends;
  ends.follows(w.delta, rows * p.num_heads);
  check_maps(p, plan, ends);
  check_nothing_is_cleared(w, ends);
}

// Checks that the scratch memory of a forward is a counter of packed sequences' tiles, or holds the
// maps of a bias.
void check_forward_workspace(const Problem& p, const Plan& plan) {
  const Workspace& w = plan.workspace;
  if (plan.kernel->mask == Mask::kBias) {
    Ends ends;
    check_maps(p, plan, ends);
    return check_nothing_is_cleared(w, ends);
  }
  expect(w.bytes == (plan.kernel->persistent && p.layout == Layout::kVarlen ? 4 : 0),
         "the counter is all of the workspace");
}

// Checks the scratch memory: each part comes after the other, is aligned, and is as large as the
// kernels take it to be.
void check_workspace(const Problem& p, const Plan& plan) {
  const Workspace& w = plan.workspace;
  const Kernel& kernel = *plan.kernel;
  const bool varlen = p.layout == Layout::kVarlen;
  const Wide batch = varlen ? 1 : p.batch, heads = p.num_heads, heads_kv = p.num_heads_kv;
  expect(w.rows_q >= (varlen ? p.total_q : p.seqlen_q) &&
             w.rows_k >= (varlen ? p.total_k : p.seqlen_k),
         "all rows have a place");
  expect(w.rows_q % kernel.block_m == 0 && w.rows_k % kernel.block_n == 0, "rows are whole tiles");
  expect(Wide{w.rows_q} * kernel.head_dim <= INT32_MAX &&
             Wide{w.rows_k} * kernel.head_dim_v <= INT32_MAX,
         "the kernels can index an accumulator's row in int32");
  Ends ends;
  const auto follows = [&ends](int64_t offset, Wide elements) { ends.follows(offset, elements); };
  follows(w.lse_log2, batch * heads * w.rows_q);
  follows(w.delta, batch * heads * w.rows_q);
  expect(w.numbers_in_dq == (ends.end() <= Wide{2} * p.total_q * heads * p.head_dim),
         "the row numbers lie in dQ where they fit");
  if (w.numbers_in_dq) ends.start_again();
  follows(w.dq_accum, batch * heads * w.rows_q * kernel.head_dim);
  expect(w.zeroed >= ends.end(), "what is zeroed comes last");
  if (kernel.grouped) follows(w.dk_accum, batch * heads_kv * w.rows_k * kernel.head_dim);
  if (kernel.grouped) follows(w.dv_accum, batch * heads_kv * w.rows_k * kernel.head_dim_v);
  if (kernel.deterministic) follows(w.dq_semaphore, Wide{p.batch} * heads * w.tiles_q * w.cluster);
  if (kernel.deterministic && kernel.grouped) {
    follows(w.dk_semaphore, Wide{p.batch} * heads_kv * w.tiles_k * 2);
    follows(w.dv_semaphore, Wide{p.batch} * heads_kv * w.tiles_k * 2);
  }
  expect(w.bytes >= ends.end() && w.bytes < kBound, "it ends behind its last part");
}

void check(const Problem& p, const Plan& plan, const KernelSet& disabled) {
  expect(!plan.kernel || !first_needed_in(disabled, *plan.kernel), "no disabled kernel runs");
  expect(plan.supported() == !plan.reason, "there is either a kernel or a reason");
  expect(!plan.reason || !plan.reason->empty(), "a reason says something");
  const bool of_kernels_only = (p.op != Op::kForward && p.op != Op::kBackward) ||
                               p.layout == Layout::kPaged || p.layout == Layout::kAny;
  expect(!plan.stock_is_faster || !plan.supported(),
         "a speed rule leaves the problem to the stock kernel");
  if (plan.nothing_to_compute) {
    expect(!plan.kernel && plan.workspace.bytes == 0, "nothing takes neither a kernel nor memory");
    return;
  }
  if (!plan.supported() || of_kernels_only) return;
  const Kernel& kernel = *plan.kernel;
  expect(&kernel >= kKernels && &kernel < kKernels + kNumKernels, "the kernel is of the table");
  const bool two_passes = kernel.op == Op::kBackwardKeys;
  expect(kernel.op == p.op || (kernel.op == Op::kDecode && p.op == Op::kForward) ||
             ((two_passes || kernel.op == Op::kBackwardGroups) && p.op == Op::kBackward),
         "the kernel is of the problem's op");
  const bool in_groups = kernel.op == Op::kBackwardGroups;
  expect(!in_groups || !p.deterministic, "the kernel of groups adds dQ up in no order");
  expect(!in_groups || p.num_heads > p.num_heads_kv || p.layout == Layout::kVarlen ||
             !disabled.empty(),
         "of MHA it runs packed sequences alone, unless kernels are disabled");
  expect(kernel.dtype == p.dtype, "the kernel is of the problem's dtype");
  expect(kernel.arch == (p.capability == 90 ? 90 : 100),
         "the kernel is of the device's architecture");
  expect(kernel.head_dim >= p.head_dim && kernel.head_dim_v >= p.head_dim_v,
         "the kernel's bucket holds the head dims");
  expect(p.bias == (kernel.mask == Mask::kBias), "a bias has kernels of its own");
  expect((p.page_size > 0) == (kernel.layout == Layout::kPaged) || kernel.op == Op::kDecode,
         "keys in pages have kernels of their own");
  expect(p.num_heads % p.num_heads_kv == 0, "heads of keys share query heads evenly");
  const auto bound = [](int32_t size) { return size >= 0 && size <= kUnbounded; };
  expect(bound(plan.window_size_left) && bound(plan.window_size_right),
         "window bounds can be added to rows in int32");
  const int32_t most = kernel.op == Op::kDecode ? 16 : kernel.op == Op::kBackwardKeys ? 8 : 1;
  expect(plan.splits >= 1 && plan.splits <= most, "a cluster holds the splits");
  const TileSchedule& schedule = plan.schedule;
  if (kernel.persistent) {
    expect(schedule.num_ctas >= 1 && schedule.num_ctas <= std::max(p.sm_count, 1),
           "CTAs are no more than SMs");
    expect(schedule.paired_heads >= 0 && schedule.paired_heads <= Wide{p.batch} * p.num_heads,
           "no more heads are paired than there are");
  } else {
    expect(schedule.num_ctas == 0 && schedule.paired_heads == 0,
           "only a persistent kernel has a schedule");
  }
  if (two_passes) {
    check_two_pass_workspace(p, plan);
    expect(kernel.preprocess >= 0 && kKernels[kernel.preprocess].op == Op::kBackwardQueries,
           "its first pass is there");
  } else if (p.op == Op::kBackward) {
    check_workspace(p, plan);
    expect(plan.heads_together >= 1, "heads are worked on");
    for (int row : {kernel.preprocess, kernel.postprocess_dq})
      expect(row >= 0 && row < kNumKernels, "its preprocess and postprocess kernels are there");
  } else {
    check_forward_workspace(p, plan);
  }
}

bool same(const Plan& a, const Plan& b) {
  return a.kernel == b.kernel && a.splits == b.splits &&
         a.schedule.num_ctas == b.schedule.num_ctas &&
         a.schedule.paired_heads == b.schedule.paired_heads && a.reason == b.reason &&
         a.workspace.bytes == b.workspace.bytes;
}

std::string text(const Asked& asked) {
  const auto& [p, overrides, disabled] = asked;
  return concat(
      "op ", int{static_cast<int8_t>(p.op)}, ", capability ", p.capability, ", sm_count ",
      p.sm_count, ", dtype ", int{static_cast<int8_t>(p.dtype)}, ", layout ",
      int{static_cast<int8_t>(p.layout)}, ", batch ", p.batch, ", seqlen ", p.seqlen_q, " and ",
      p.seqlen_k, ", total ", p.total_q, " and ", p.total_k, ", heads ", p.num_heads, " and ",
      p.num_heads_kv, ", head_dim ", p.head_dim, " and ", p.head_dim_v, ", causal ", p.is_causal,
      ", window ", p.window_size_left, " and ", p.window_size_right, ", deterministic ",
      p.deterministic, ", page_size ", p.page_size, ", num_splits ", p.num_splits, ", bias ",
      p.bias, " of ", p.bias_batch, " and ", p.bias_heads, ", tile ", overrides.tile.queries, "x",
      overrides.tile.keys, ", schedule ", overrides.schedule.num_ctas, " and ",
      overrides.schedule.paired_heads, ", decode ", int{static_cast<int8_t>(overrides.decode)},
      ", some kernels disabled ", !disabled.empty());
}

// Plans all problems and returns how many of them have a kernel.
int plan_all(Random& random) {
  static const std::vector<TileRule> no_rules;
  int supported = 0;
  for (int i = 0; i < kProblems; ++i) {
    Asked asked = realistic(random);
    // A third of the problems stay as they are. A third get a few extreme values, with which the
    // first checks do not yet end the plan. The rest get many.
    const int64_t extremes = std::array<int64_t, 3>{
        0, random.between(1, 3), random.between(4, 20)}[static_cast<size_t>(i % 3)];
    for (int64_t n = 0; n < extremes; ++n) make_extreme(asked, random);
    const bool speed_rules = random.one_in(2);
    const auto& tile_rules = random.one_in(2) ? kTileRules : no_rules;
    try {
      const auto ask = [&] {
        return plan(asked.problem, speed_rules, asked.overrides, tile_rules, asked.disabled);
      };
      const Plan first = ask();
      check(asked.problem, first, asked.disabled);
      if (i % 16 == 0) expect(same(first, ask()), "the same problem gets the same plan");
      supported += first.supported();
    } catch (const Error& error) {
      fail(error.what(), ", for ", text(asked));
    }
  }
  return supported;
}

// Checks that there are no gaps and no overlaps: from the innermost dimension on, each stride is
// the number of elements further in.
void check_strides(int64_t dim, const int64_t* size, const int64_t* stride) {
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t d = 0; d < dim; ++d) {
    if (size[d] > 1) order.emplace_back(stride[d], size[d]);
  }
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (const auto& [step, count] : order) {
    if (step != expected) fail("a stride of ", step, " follows ", expected, " elements");
    expected *= count;
  }
}

void stride_all(Random& random) {
  for (int i = 0; i < kShapes; ++i) {
    const int64_t dim = random.between(0, kMaxDim);
    const bool extreme = random.one_in(2);
    std::array<int64_t, kMaxDim> size, stride, result;
    for (size_t d = 0; d < kMaxDim; ++d) {
      size[d] = extreme ? random.of(kExtremes) : random.up_to(50);
      stride[d] = extreme ? random.of(kExtremes) : random.up_to(5000) - 1;
    }
    empty_like_strides(dim, size.data(), stride.data(), result.data());
    if (!extreme) check_strides(dim, size.data(), result.data());
    output_strides(dim, size.data(), stride.data(), result.data());
    if (!extreme) check_strides(dim, size.data(), result.data());
    contiguous_strides(dim, size.data(), result.data());
    if (!extreme) check_strides(dim, size.data(), result.data());
    if (dim == 0) continue;
    const int64_t offset = 2 * random.up_to(64);
    const bool addressable = tma_can_address(dim, size.data(), stride.data(), offset);
    const auto expected = [&](int64_t bytes) {
      bool holds = offset % bytes == 0 && stride[static_cast<size_t>(dim - 1)] == 1;
      for (size_t d = 0; d + 1 < static_cast<size_t>(dim); ++d) {
        if (size[d] > 1) holds = holds && stride[d] >= 0 && Wide{2} * stride[d] % bytes == 0;
      }
      return holds;
    };
    expect(addressable == expected(16),
           "TMA can address what is contiguous, aligned to 16 bytes and of strides of 16 bytes");
    expect(can_read_pairs(dim, size.data(), stride.data(), offset) == expected(4),
           "pairs can be read of what is contiguous, aligned to 4 bytes and of strides of 4 bytes");
  }
}

int run() {
  Random random(17);
  try {
    const int supported = plan_all(random);
    stride_all(random);
    std::cout << kProblems << " problems, of which " << supported << " have a kernel, and "
              << kShapes << " shapes: no fault\n";
    return supported > kProblems / 8 ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const Error& error) {
    std::cerr << error.what() << '\n';
    return EXIT_FAILURE;
  }
}

}  // namespace
}  // namespace fa4

int main() { return fa4::run(); }
