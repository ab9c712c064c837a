// How the tiles of a persistent forward are assigned to its CTAs (kernels/sm90/tiles.py has the
// order in which each CTA takes them).
#pragma once

#include <optional>
#include <string>

#include "kernel_table.h"
#include "overrides.h"
#include "problem.h"

namespace fa4 {

// Sets the schedule of a persistent kernel: the forced one where there is one to choose, otherwise
// the planner's. Returns the reason why there is none: the kernel cannot number so many tiles in
// int32, or the forced schedule does not fit the problem.
std::optional<std::string> schedule_tiles(const Problem& problem, const Kernel& kernel,
                                          const TileSchedule& forced, TileSchedule& schedule);

}  // namespace fa4
