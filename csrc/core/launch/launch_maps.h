#pragma once

#include "argument_list.h"
#include "launch.h"

namespace fa4 {

// Launches what a kernel with a bias is launched after: the lists of tiles that the bias leaves to
// each query tile and, in a backward, to each key block.
void launch_maps(const Problem& problem, const Plan& plan, const BiasView& bias, void* workspace,
                 const Target& target);

// Adds a bias and the lists of `map`, one of the maps of `kernel`, to the arguments of a launch.
// Where the kernel takes no bias, this adds nothing.
void add_bias_and_lists(ArgumentList& list, const Problem& problem, const Kernel& kernel,
                        const BiasView& bias, int16_t map, int32_t* lists);

}  // namespace fa4
