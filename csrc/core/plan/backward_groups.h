// Which backwards run on the kernel whose CTAs work on all query heads of their keys: of GQA and
// MQA, and of short packed sequences.
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether `groups`, that kernel, was faster for such problems than the other one.
bool groups_are_faster(const Problem& problem, const Kernel& groups);

// How many key/value heads that kernel works on before the next ones; 1 for others.
int32_t heads_together(const Problem& problem, const Kernel& kernel);

}  // namespace fa4
