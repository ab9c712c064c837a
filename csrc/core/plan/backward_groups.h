// Which backwards of GQA and MQA run on the kernel whose CTAs work on all query heads of their
// keys.
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether `groups`, that kernel, was measured to be faster than the other kernel for such problems,
// and than cuDNN.
bool groups_are_faster(const Problem& problem, const Kernel& groups);

}  // namespace fa4
