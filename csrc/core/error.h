// Errors of the library: exceptions whose text says what failed and with which values. Never an
// exit, never a print.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fa4 {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Device memory is exhausted. The text begins like torch's own, which programs search for in order
// to retry with less.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(concat(parts...));
}

}  // namespace fa4
