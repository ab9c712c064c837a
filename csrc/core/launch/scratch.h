// A call's workspace in device memory.
#pragma once

#include "../plan/workspace.h"
#include "launch.h"

namespace fa4 {

struct Scratch {
  char* base;

  explicit Scratch(void* memory) : base(static_cast<char*>(memory)) {}
  template <class T = void>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base + offset);
  }
};

// Clears what must be zero before the launch.
void clear(const Workspace& workspace, const Scratch& scratch, const Target& target);

}  // namespace fa4
