// Putting the overrides into torch's dispatcher and taking them out again.
#pragma once

namespace fa4::aten {

void register_overrides();  // on top of whatever is registered; ours, if it is there already, moves to the top
void remove_overrides();    // does nothing when not registered

}  // namespace fa4::aten
