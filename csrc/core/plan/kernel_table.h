// The compiled kernels. kernels/build.py generates the table's definition from kernels/matrix.py.
#pragma once

#include <cstdint>

#include "problem.h"

namespace fa4 {

struct Kernel {
  const char* name;
  Op op;
  int16_t arch;  // 90, or 100 for the family 10.0 and 10.3
  Dtype dtype;
  int16_t head_dim;    // bucket of q and k: the kernel serves every multiple of 8 up to it
  int16_t head_dim_v;  // bucket of v and o
  Layout layout;
  // Whether the queries of all sequences are rows of one tensor.
  bool packed() const { return layout == Layout::kVarlen || layout == Layout::kPaged; }
  Mask mask;
  // Backward in one pass: the kernel for GQA and MQA, which adds up dK and dV of the query heads
  // that share a key/value head in accumulators.
  bool grouped;
  bool deterministic;  // backward in one pass
  bool two_cta;
  bool persistent;  // each CTA works on one tile after the other
  bool tuned;       // runs only where a tile rule says so (tile_rules.h), in the default's place
  int16_t block_m;  // rows of a query tile
  int16_t block_n;  // rows of a key block
  int16_t ctas_per_sm;  // decode: how many CTAs an SM holds
  // Rows of this table that a backward launches before and after this one; -1: none. A backward in
  // two passes, which is planned on the second, launches the first as its preprocess kernel.
  int16_t preprocess, postprocess_dq, postprocess_dk, postprocess_dv;
  // The same of what a kernel with a bias launches first, the second one in a backward only.
  int16_t map_queries, map_keys;

  // export_to_c's entry points; each takes an array of pointers to its arguments.
  void (*load)(void** arguments);
  void (*load_to_device)(void** arguments);
  void (*launch)(void** arguments, int32_t count);
  int32_t num_arguments;  // of launch, but for the stream and the result, which come last
};

extern const Kernel kKernels[];
extern const int32_t kNumKernels;

// JSON object: kernel subset, architectures, versions of the kernels' sources, hash of the
// manifest.
extern const char* const kBuildInfo;
// JSON array, one object a kernel: name, arch, registers, spill_bytes, shared_memory_bytes,
// object_bytes.
extern const char* const kManifest;

}  // namespace fa4
