// Marks a range that torch's profilers show: torch.profiler and, under
// torch.autograd.profiler.emit_nvtx(), NVTX tools such as Nsight.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fa4::aten {

// The range lasts as long as the object. It does nothing where torch has no such functions. While
// no profiler runs, torch keeps neither name nor time: a range takes 30 ns with torch 2.13. Asking
// at::hasCallbacks() first would take 19 ns and a lock that all threads share.
class ProfileRange {
 public:
  explicit ProfileRange(const char* name);
  ~ProfileRange();
  ProfileRange(const ProfileRange&) = delete;
  ProfileRange& operator=(const ProfileRange&) = delete;

 private:
  AtenRecordFunctionHandle range_ = nullptr;
};

}  // namespace fa4::aten
