// Maps a dtype to the element type of a kernel. A dtype that no case names throws.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "pbs/fail.h"
#include "pbs/params.h"

namespace pbs::cuda {

// Calls body(element) for the types that tensor cores multiply.
template <class Body>
auto dispatch_half(DType dtype, const Body& body) -> decltype(body(cutlass::half_t{})) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(cutlass::bfloat16_t{});
    case DType::kFloat16:
      return body(cutlass::half_t{});
    case DType::kFloat32:
      break;
  }
  fail("q must be bfloat16 or float16 on CUDA, got float32");
}

// Calls body(element) for every type.
template <class Body>
auto dispatch_element(DType dtype, const Body& body) -> decltype(body(cutlass::half_t{})) {
  return dtype == DType::kFloat32 ? body(float{}) : dispatch_half(dtype, body);
}

}  // namespace pbs::cuda
