#include "explain.h"

#include <optional>
#include <string>

#include "../core/error.h"
#include "bias.h"
#include "calls.h"
#include "context.h"
#include "decide.h"
#include "describe.h"

namespace fa4::aten {
namespace {

constexpr KnownOp kExplain{"explain", {25, 25}, 6};

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

Peer peer_of(const std::string& name) {
  if (name == "flash") return Peer::kFlash;
  if (name == "cudnn") return Peer::kCudnn;
  if (name == "efficient") return Peer::kEfficient;
  fail("peer must be flash, cudnn or efficient, is ", name);
}

// Returns the note on a supported call, which says which of its inputs are copied.
std::string note(const ForwardCall& call, const ForwardDescription& d) {
  const std::optional<std::string> copied = copied_inputs(call);
  const std::string text =
      copied ? concat("copied first, because TMA takes addresses and strides of 16 bytes only: ",
                      *copied)
             : "";
  if (!bias_is_copied(call, d)) return text;
  return concat(text, text.empty() ? "" : "; ",
                "copied first, because the kernels read pairs of keys, at multiples of 4 bytes: ",
                "attn_bias");
}

// Returns why the backward of a dense call runs where its forward does, on PyTorch's kernel. The
// flash ops' halves are free of each other.
std::optional<std::string> why_forward_is_stocks(const ForwardDescription& forward, Peer peer,
                                                 bool speed_rules) {
  if (peer == Peer::kFlash || forward.reason || forward.problem.layout != Layout::kDense)
    return std::nullopt;
  return choose(forward, speed_rules).reason;
}

}  // namespace

void explain(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kExplain);
  ForwardCall call = take_flash_forward(arguments, true);
  const bool deterministic = arguments.value<bool>(), backward = arguments.value<bool>(),
             speed_rules = arguments.value<bool>();
  const auto capability = arguments.value<int64_t>(), sm_count = arguments.value<int64_t>();
  call.peer = peer_of(arguments.value<std::string>());
  call.is_own = arguments.value<bool>();
  call.attn_bias = arguments.optional_tensor();
  const auto device = device_asked_for(capability, sm_count);
  ForwardDescription d = describe(call, device ? &*device : nullptr);
  if (backward && !d.reason) d.reason = why_forward_is_stocks(d, call.peer, speed_rules);
  d.problem.op = backward ? Op::kBackward : Op::kForward;
  d.problem.deterministic = backward && deterministic;
  if (backward && !d.reason && call.attn_bias && wants_gradient({call.attn_bias.get()}))
    d.reason = kNoGradientOfBias;
  if (backward) d.problem.num_splits = 0;  // an argument of the forward alone
  const Plan chosen = choose(d, speed_rules);
  stack[0] = torch::stable::detail::from(chosen.supported());
  stack[1] = torch::stable::detail::from(std::string(chosen.name()));
  stack[2] = torch::stable::detail::from(chosen.reason ? *chosen.reason : note(call, d));
  stack[3] = torch::stable::detail::from(chosen.tile_q());
  stack[4] = torch::stable::detail::from(chosen.tile_k());
  stack[5] = torch::stable::detail::from(chosen.supported() ? chosen.workspace.bytes : int64_t{0});
}

}  // namespace fa4::aten
