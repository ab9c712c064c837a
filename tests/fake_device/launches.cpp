// Launches the kernels of a table behind device.c, with arguments of no meaning. The table's entry
// points are the three below, which run nothing. Prints the name of each kernel that a call begins
// with, and behind it what the call threw; at last what a list threw that has no end.
#include <iostream>
#include <vector>

#include "launch/argument_list.h"
#include "launch/launch.h"

extern "C" {
void load(void**) {}
void load_to_device(void**) {}
void launch(void**, int32_t) {}
}

namespace fa4 {
namespace {

bool is_backward(const Kernel& kernel) {
  return kernel.op == Op::kBackward || kernel.op == Op::kBackwardGroups ||
         kernel.op == Op::kBackwardKeys;
}

bool launched_by_another(const Kernel& kernel) {
  return kernel.op == Op::kBackwardQueries || kernel.op == Op::kMapQueries ||
         kernel.op == Op::kMapKeys || kernel.op == Op::kPreprocess || kernel.op == Op::kPostprocess;
}

Problem problem_of(const Kernel& kernel) {
  Problem p;
  p.op = is_backward(kernel) ? Op::kBackward : Op::kForward;
  p.capability = kernel.arch;
  p.sm_count = 1;
  p.dtype = kernel.dtype;
  p.layout = kernel.packed() ? Layout::kVarlen : Layout::kDense;
  p.page_size = kernel.layout == Layout::kPaged ? kPageMultiple : 0;
  p.batch = 1;
  p.seqlen_q = p.seqlen_k = p.total_q = p.total_k = 1;
  p.num_heads = 2;
  p.num_heads_kv = kernel.grouped || kernel.op == Op::kBackwardGroups ? 1 : 2;
  p.head_dim = kernel.head_dim;
  p.head_dim_v = kernel.head_dim_v;
  p.bias = kernel.mask == Mask::kBias;
  return p;
}

void call(const Kernel& kernel) {
  const Problem p = problem_of(kernel);
  if (kernel.op == Op::kClear) return clear_unwritten(p, {}, {});
  Plan plan;
  plan.kernel = &kernel;
  plan.workspace = workspace_of(p, kernel);
  std::vector<char> memory(static_cast<size_t>(plan.workspace.bytes));
  if (is_backward(kernel)) {
    BackwardArguments arguments;
    arguments.workspace = arguments.dq.data = memory.data();
    return launch_backward(p, plan, arguments, {});
  }
  ForwardArguments arguments;
  arguments.workspace = memory.data();
  launch_forward(p, plan, arguments, {});
}

void endless(const Kernel& kernel) {
  const Problem p = problem_of(kernel);
  ArgumentList list(p, kernel, whole(p));
  while (true) list.add(1.0f);
}

template <class Function>
void print(const char* name, Function function, const Kernel& kernel) {
  std::cout << name << ' ';
  try {
    function(kernel);
  } catch (const std::exception& error) {
    std::cout << error.what();
  }
  std::cout << '\n';
}

}  // namespace
}  // namespace fa4

int main() {
  using namespace fa4;
  for (const Kernel* kernel = kKernels; kernel != kKernels + kNumKernels; ++kernel) {
    if (launched_by_another(*kernel)) continue;
    print(kernel->name, call, *kernel);
  }
  print("endless", endless, kKernels[0]);
}
