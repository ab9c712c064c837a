#include "explain.h"

#include <optional>
#include <string>

#include "../core/error.h"
#include "../core/launch/dynamic_library.h"
#include "calls.h"
#include "decide.h"
#include "describe.h"
#include "dispatcher_library.h"

namespace fa4::aten {
namespace {

// The op takes the arguments of _flash_attention_forward as torch 2.12 has them, then what to ask
// about them: `cudnn` says that the call comes in through a cuDNN op. A capability of 0 stands for
// query's own device.
constexpr const char* kSchema =
    "explain(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "int max_q, int max_k, float dropout_p, bool is_causal, bool return_debug_mask, float? scale, "
    "int? window_size_left, int? window_size_right, Tensor? seqused_k, Tensor? alibi_slopes, "
    "Tensor? block_table, int? num_splits, bool deterministic, bool backward, bool speed_rules, "
    "int capability, int sm_count, bool cudnn=False) -> (bool supported, str kernel, str reason, "
    "int tile_q, int tile_k, int workspace_bytes)";

constexpr KnownOp kExplain{"explain", {23, 23}, 6};

// The largest supported devices have 160 SMs. With 1,024 the planner's arithmetic is still far from
// its limits.
constexpr int64_t kMaxSmCount = 1024;
// A capability is ten times the major number, plus the minor one.
constexpr int64_t kMinCapability = 10, kMaxCapability = 999;

// Returns nothing where query's own device is asked for.
std::optional<Processors> device_asked_for(int64_t capability, int64_t sm_count) {
  if (capability != 0 && (capability < kMinCapability || capability > kMaxCapability)) {
    fail(
        "capability must be 0, for query's own device, or ten times the major number and the minor "
        "one, from ",
        kMinCapability, " to ", kMaxCapability, ", such as 90; is ", capability);
  }
  const int64_t least = capability ? 1 : 0;
  if (sm_count < least || sm_count > kMaxSmCount) {
    fail("sm_count, the device's SMs, must be from ", least, " to ", kMaxSmCount,
         " with a capability of ", capability, "; is ", sm_count);
  }
  if (!capability) return std::nullopt;
  return Processors{static_cast<int32_t>(capability), static_cast<int32_t>(sm_count), true};
}

// Returns the note on a supported call, which says which of its inputs are copied.
std::string note(const ForwardCall& call) {
  const std::optional<std::string> copied = copied_inputs(call);
  return copied ? concat("copied first, because TMA takes addresses and strides of 16 bytes only: ",
                         *copied)
                : "";
}

void explain(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kExplain);
  ForwardCall call = take_flash_forward(arguments, true);
  const bool deterministic = arguments.value<bool>(), backward = arguments.value<bool>(),
             speed_rules = arguments.value<bool>();
  const auto capability = arguments.value<int64_t>(), sm_count = arguments.value<int64_t>();
  if (arguments.value<bool>()) call.peer = Peer::kCudnn;
  const auto device = device_asked_for(capability, sm_count);
  ForwardDescription d = describe(call, device ? &*device : nullptr);
  d.problem.op = backward ? Op::kBackward : Op::kForward;
  d.problem.deterministic = backward && deterministic;
  if (backward) d.problem.num_splits = 0;  // an argument of the forward alone
  const Plan chosen = choose(d, speed_rules);
  stack[0] = torch::stable::detail::from(chosen.supported());
  stack[1] = torch::stable::detail::from(std::string(chosen.name()));
  stack[2] = torch::stable::detail::from(chosen.reason ? *chosen.reason : note(call));
  stack[3] = torch::stable::detail::from(chosen.tile_q());
  stack[4] = torch::stable::detail::from(chosen.tile_k());
  stack[5] = torch::stable::detail::from(chosen.supported() ? chosen.workspace.bytes : int64_t{0});
}

// Returns the path of this library, which tells copies apart in torch's errors.
const char* own_path() {
  Dl_info info;
  return dladdr(reinterpret_cast<const void*>(&explain_problem), &info) && info.dli_fname
             ? info.dli_fname
             : "libfa4_ext.so";
}

struct Definition {
  DispatcherLibrary schema{"fa4_ext", own_path()};
  DispatcherLibrary kernel{"fa4_ext", "CompositeExplicitAutograd", own_path()};

  Definition() {
    schema.define(kSchema);
    kernel.implement(kExplain.name, &explain);
  }
};

// Returns the problem, or an empty text. The definition is never destroyed, because other threads
// may still call while the process exits.
std::string define() noexcept {
  try {
    new Definition;
    return "";
  } catch (const std::exception& error) {
    return concat("PyTorch refused to define the operators fa4_ext::* for ", own_path(),
                  ": another copy of this library, or another library of that name, has defined "
                  "them in this process. PyTorch says: ",
                  error.what());
  }
}

// An exception while the library is loaded would end the process, so the problem is kept.
[[maybe_unused]] const char* const problem_at_load = explain_problem();

}  // namespace

const char* explain_problem() noexcept {
  static const auto* const problem = new std::string(define());
  return problem->c_str();
}

}  // namespace fa4::aten
