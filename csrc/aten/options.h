// What register() was asked for. Written at registration, read by every call.
#pragma once

#include <atomic>

namespace fa4::aten {

struct Options {
  std::atomic<bool> strict{false};      // raise instead of calling the stock kernel
  std::atomic<bool> speed_rules{true};  // leave to the stock kernel what it runs faster
};

inline Options& options() {
  static Options options;
  return options;
}

}  // namespace fa4::aten
