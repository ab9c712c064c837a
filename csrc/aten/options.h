// What register() was asked for, and what measurements and tests override. Every call reads it.
#pragma once

#include <atomic>

#include "../core/plan/kernel_set.h"
#include "../core/plan/overrides.h"

namespace fa4::aten {

struct Options {
  std::atomic<bool> strict{false};      // raise instead of calling the stock kernel
  std::atomic<bool> speed_rules{true};  // leave to the stock kernel what it runs faster
  std::atomic<bool> prefer{true};       // take the calls of cuDNN's and efficient ops too
};

Options& options();

// Throws an Error that says which options there are, or which values the option takes.
void set_option(const char* name, int value);

// The kernels that run no call, from the next one on. Patterns are separated by commas or spaces.
// Throws an Error about a pattern that matches no kernel; nothing has changed then.
void disable_kernels(const char* patterns);

// The set lives as long as the process.
const KernelSet& disabled_kernels();

Overrides overrides();
void set_overrides(const Overrides& overrides);

}  // namespace fa4::aten
