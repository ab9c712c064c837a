// What measurements and tests set in the planner's place. The library exports it, but it is no part
// of the product's interface: this header is not installed, and it may change with every version.
#pragma once

extern "C" {

// Sets all overrides, from the next call of an op on. All zeros: the planner's choice, as at first.
// It is for a single thread: a call that runs meanwhile may see some of the new ones only.
//
// tile_queries, tile_keys: only the kernels with this tile run, and other calls count as ones that
// no kernel here runs.
//
// num_ctas, paired_heads: the tiles of a dense forward without a window on Hopper go to this many
// CTAs; under a causal mask `paired_heads` heads of the batch have theirs paired, a long one with a
// short one (docs/kernels-sm90.md). A call with fewer heads, or on a device
// with fewer SMs, counts as one that no kernel here runs.
//
// decode: few queries run on the decode kernel wherever it can run them (1), only where the other
// kernel cannot (-1), or where it is the faster one (0).
__attribute__((visibility("default"))) void fa4_ext_override(int tile_queries, int tile_keys,
                                                             int num_ctas, int paired_heads,
                                                             int decode) noexcept;
}
