#pragma once

#include "launch.h"
#include "part.h"

namespace fa4 {

// Launches the decode kernel on a part of a forward that is planned for it.
void decode(const Problem& problem, const Plan& plan, const ForwardArguments& arguments,
            const Part& part, const Target& target);

}  // namespace fa4
