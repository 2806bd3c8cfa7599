// Names of the dtypes of tensors, as in the Python API of torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <exception>

namespace pbs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Undefined for dtypes without a name in the stable ABI, which throws its own message for them.
inline ScalarType dtype_of(const Tensor& t) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::Float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2fnuz:
      return "float8_e5m2fnuz";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

}  // namespace pbs
