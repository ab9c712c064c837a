// Some functions are missing from a supported torch, or from its stable interface. Linking to them
// would tie the library to some versions of torch, so they are looked up by name in the libraries
// that torch has loaded.
#pragma once

namespace fa4::aten {

// Returns null where the library is not loaded or has no such function.
void* torch_symbol(const char* library, const char* name);

template <class Function>
Function* torch_function(const char* library, const char* name) {
  return reinterpret_cast<Function*>(torch_symbol(library, name));
}

}  // namespace fa4::aten
