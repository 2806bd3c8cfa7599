// The one way to refuse something: an exception with words for the user.
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
