// Turns a size known at run time into one known at compile time. A size that no case names throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <sstream>
#include <string>
#include <type_traits>

#include "pbs/fail.h"

namespace pbs {

// Head dims that have kernels. Each GPU family has tile sizes for every one of them.
constexpr int kHeadDims[] = {64, 96, 128, 256};

constexpr bool is_head_dim(int64_t head_dim) {
  for (const int size : kHeadDims) {
    if (size == head_dim) return true;
  }
  return false;
}

// "64, 96, 128 or 256".
inline std::string head_dims_text() {
  std::ostringstream text;
  const size_t last = std::size(kHeadDims) - 1;
  for (size_t i = 0; i <= last; ++i) {
    text << (i == 0 ? "" : i == last ? " or " : ", ") << kHeadDims[i];
  }
  return text.str();
}

// Calls body(std::integral_constant<int, head_dim>). Every instance must return the same type.
template <size_t kIdx = 0, class Body>
auto dispatch_head_dim(int64_t head_dim, const Body& body)
    -> decltype(body(std::integral_constant<int, kHeadDims[0]>{})) {
  if constexpr (kIdx < std::size(kHeadDims)) {
    if (head_dim == kHeadDims[kIdx]) return body(std::integral_constant<int, kHeadDims[kIdx]>{});
    return dispatch_head_dim<kIdx + 1>(head_dim, body);
  } else {
    fail("head_dim must be one with a kernel, got ", head_dim);
  }
}

}  // namespace pbs
