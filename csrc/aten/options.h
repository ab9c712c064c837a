// What register() was asked for, and what measurements and tests force. Read by every call.
#pragma once

#include <atomic>

#include "../core/plan/problem.h"

namespace fa4::aten {

struct Options {
  std::atomic<bool> strict{false};      // raise instead of calling the stock kernel
  std::atomic<bool> speed_rules{true};  // leave to the stock kernel what it runs faster
  std::atomic<Tile> tile{Tile{}};       // the only one to run; none: the planner's choice
  std::atomic<Dealing> dealing{
      Dealing{}};  // where there is one to choose; none: the planner's choice
  std::atomic<Decode> decode{Decode::kWhereFaster};
};

inline Options& options() {
  static Options options;
  return options;
}

}  // namespace fa4::aten
