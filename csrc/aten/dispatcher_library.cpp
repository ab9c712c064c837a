#include "dispatcher_library.h"

#include "../core/error.h"
#include "tensors.h"

namespace fa4::aten {
namespace {

constexpr uint32_t kNoLine = 0;

}  // namespace

DispatcherLibrary::DispatcherLibrary(const char* name_space, const char* file) {
  check_shim(aoti_torch_library_init_def(name_space, file, kNoLine, &handle_),
             "claiming a namespace of operators");
}

DispatcherLibrary::DispatcherLibrary(const char* name_space, const char* dispatch_key,
                                     const char* file) {
  check_shim(aoti_torch_library_init_impl(name_space, dispatch_key, file, kNoLine, &handle_),
             "registering with the dispatcher");
}

DispatcherLibrary::~DispatcherLibrary() {
  if (handle_) aoti_torch_delete_library_object(handle_);
}

void DispatcherLibrary::define(const char* schema) {
  check_shim(aoti_torch_library_def(handle_, schema), "defining an operator");
}

void DispatcherLibrary::implement(const char* op, BoxedKernel* kernel) {
  check_shim(torch_library_impl(handle_, op, kernel, TORCH_ABI_VERSION),
             concat("registering a kernel for ", op).c_str());
}

}  // namespace fa4::aten
