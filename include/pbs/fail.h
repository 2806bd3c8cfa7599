// Throws an exception with a message for the user. All checks use it.
#pragma once

#include <sstream>
#include <stdexcept>

namespace pbs {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace pbs
