#include "own_ops.h"

#include <string>

#include "../core/error.h"
#include "../core/launch/dynamic_library.h"
#include "attention.h"
#include "dispatcher_library.h"
#include "explain.h"

namespace fa4::aten {
namespace {

// CMakeLists.txt names the namespace, because each library in a process needs one of its own.
constexpr const char* kNamespace = FA4_EXT_OP_NAMESPACE;

// Returns the path of this library, which tells copies apart in torch's errors.
const char* own_path() {
  Dl_info info;
  return dladdr(reinterpret_cast<const void*>(&own_ops_problem), &info) && info.dli_fname
             ? info.dli_fname
             : "libfa4_ext.so";
}

struct Definition {
  DispatcherLibrary schemas{kNamespace, own_path()};
  DispatcherLibrary on_any_device{kNamespace, "CompositeExplicitAutograd", own_path()};
  DispatcherLibrary on_cuda{kNamespace, "CUDA", own_path()};

  Definition() {
    schemas.define(kExplainSchema);
    schemas.define(kAttentionSchema);
    schemas.define(kAttentionBackwardSchema);
    on_any_device.implement("explain", &explain);
    on_cuda.implement("attention", &attention);
    on_cuda.implement("attention_backward", &attention_backward);
  }
};

// Returns the problem, or an empty text. The definition is never destroyed, because other threads
// may still call while the process exits.
std::string define() noexcept {
  try {
    new Definition;
    return "";
  } catch (const std::exception& error) {
    return concat("PyTorch refused to define the operators ", kNamespace, "::* for ", own_path(),
                  ": another copy of this library, or another library of that name, has defined "
                  "them in this process. PyTorch says: ",
                  error.what());
  }
}

// An exception while the library is loaded would end the process, so the problem is kept.
[[maybe_unused]] const char* const problem_at_load = own_ops_problem();

}  // namespace

const char* own_ops_problem() noexcept {
  static const auto* const problem = new std::string(define());
  return problem->c_str();
}

}  // namespace fa4::aten
