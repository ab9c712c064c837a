// Defines this library's own operators, torch.ops.fa4_ext.*, when the library is loaded. In the
// library of a package for Hugging Face's Hub their namespace has another name (scripts/hub/).
#pragma once

namespace fa4::aten {

// Returns why torch refused the operators, for people to read: another copy of this library has
// taken their namespace, for example. The text is empty where they are defined.
const char* own_ops_problem() noexcept;

}  // namespace fa4::aten
