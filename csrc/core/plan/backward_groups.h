// Which backwards of GQA and MQA run on the kernel whose CTAs work on all query heads of their
// keys.
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether `groups`, that kernel, was faster for such problems than the other one, in a form before
// its last (docs/kernels-sm90-experiments.md).
bool groups_are_faster(const Problem& problem, const Kernel& groups);

}  // namespace fa4
