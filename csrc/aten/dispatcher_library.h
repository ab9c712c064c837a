// Registrations with torch's dispatcher through its C shim, every one of which may be refused.
#pragma once

#include <torch/csrc/stable/library.h>

#include <utility>

namespace fa4::aten {

using BoxedKernel = void(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

// What it registers lasts as long as it does. torch::stable's own class takes no notice of a
// namespace that is taken, and crashes in its next call. Constructors and functions throw an Error
// with torch's reason; what was registered before stays. `file`: who registers, as the dispatcher
// shows it and names it in its errors. It must live as long.
class DispatcherLibrary {
 public:
  DispatcherLibrary(const char* name_space, const char* file);  // to define the ops of a namespace
  DispatcherLibrary(const char* name_space, const char* dispatch_key,
                    const char* file);  // to implement ops for a key
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
