// Puts the overrides into torch's dispatcher and takes them out again.
#pragma once

namespace fa4::aten {

// Puts our overrides on top of whatever is registered; if they are there already, they move to the
// top. Throws an Error, after which what was registered before is in force.
void register_overrides();
// Does nothing where no overrides are registered.
void remove_overrides();

}  // namespace fa4::aten
