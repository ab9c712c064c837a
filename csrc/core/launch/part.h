// Splits a problem into parts that fit into one launch each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../integers.h"
#include "../plan/kernel_table.h"
#include "../plan/problem.h"

namespace fa4 {

// Some of a problem's batch entries and heads.
struct Part {
  int64_t batch, batches;     // the first entry, and how many
  int64_t head_kv, heads_kv;  // the same of key/value heads
  int64_t all_heads_kv;       // of the problem

  // The first head of a tensor that has `heads` in all, and how many of them are in the part.
  int64_t first_of(int64_t heads) const { return head_kv * (heads / all_heads_kv); }
  int64_t count_of(int64_t heads) const { return heads_kv * (heads / all_heads_kv); }
};

inline Part whole(const Problem& p) { return {0, p.batch, 0, p.num_heads_kv, p.num_heads_kv}; }

// Calls `launch` with parts that make up the problem. There is one, except for batches and heads
// beyond kMaxGrid: most kernels have these in y and z of their grids. The grids of packed sequences
// have the batch in x, except the decode kernel's; persistent grids have neither batch nor heads,
// and a backward in two passes has both in x. So a bias, which only these two have, is never
// divided.
template <class Launch>
void for_each_part(const Problem& p, const Kernel& kernel, Launch&& launch) {
  const int64_t ratio = p.num_heads / p.num_heads_kv;
  const bool heads_in_y = !kernel.persistent && kernel.op != Op::kBackwardKeys,
             batch_in_z = heads_in_y && !kernel.packed();
  const int64_t most_batches = batch_in_z ? kMaxGrid : p.batch,
                most_heads = heads_in_y ? kMaxGrid / ratio : p.num_heads_kv;
  for (int64_t batch = 0; batch < p.batch; batch += most_batches) {
    for (int64_t head = 0; head < p.num_heads_kv; head += most_heads) {
      launch(Part{batch, std::min(most_batches, p.batch - batch), head,
                  std::min(most_heads, p.num_heads_kv - head), p.num_heads_kv});
    }
  }
}

}  // namespace fa4
