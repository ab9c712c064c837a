#pragma once

#include "launch.h"

namespace fa4 {

// Launches a backward that is planned on the second of two passes. Neither one adds to what another
// CTA writes: the first writes dQ and delta, the second dK and dV.
void launch_two_passes(const Problem& problem, const Plan& plan, const BackwardArguments& arguments,
                       const Target& target);

}  // namespace fa4
