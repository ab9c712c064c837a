// Putting the overrides into torch's dispatcher and taking them out again.
#pragma once

namespace fa4::aten {

// On top of whatever is registered; ours, if they are there already, move to the top. Throws an
// Error, after which what was registered before is in force.
void register_overrides();
void remove_overrides();  // does nothing when not registered

}  // namespace fa4::aten
