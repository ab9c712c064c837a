// Registers with torch's dispatcher through its C shim. The dispatcher may refuse any
// registration.
#pragma once

#include <torch/csrc/stable/library.h>

#include <utility>

namespace fa4::aten {

using BoxedKernel = void(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

// A registration lasts as long as its DispatcherLibrary. torch::stable's own class takes no notice
// of a namespace that is taken, and crashes in its next call. Constructors and functions throw an
// Error with torch's reason; what was registered before stays. `file` says who registers: the
// dispatcher shows it and names it in its errors. It must live as long as the object.
class DispatcherLibrary {
 public:
  // Makes a library that defines the ops of a namespace.
  DispatcherLibrary(const char* name_space, const char* file);
  // Makes a library that implements ops for a dispatch key.
  DispatcherLibrary(const char* name_space, const char* dispatch_key, const char* file);
  DispatcherLibrary(DispatcherLibrary&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)) {}
  DispatcherLibrary& operator=(DispatcherLibrary&&) = delete;
  ~DispatcherLibrary();

  void define(const char* schema);
  void implement(const char* op, BoxedKernel* kernel);

 private:
  TorchLibraryHandle handle_ = nullptr;
};

}  // namespace fa4::aten
