// Weights of keys, computed from scores in half precision, two at a time.
//
// The special function unit would take longer than the products. So the weight is linear between
// powers of two, within 5 % including all roundings. This only needs the bits of half precision: 5
// bits of exponent and 10 of mantissa form a 15-bit number that grows linearly with the logarithm.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace pbs::cuda::sm90 {

// Half precision holds powers of two from -15 to 16. The keys of the own segment have a total
// weight of 2^kOwnExponent: weights 2^20 times smaller count as 0, and weights 2^11 times larger
// are detected as infinite.
constexpr float kWeightRange = 31.0f;
constexpr int kOwnExponent = 5;
constexpr float kOwnWeight = 1 << kOwnExponent;
// The linear form is up to 1.061 times the power of two: half of the excess is taken off.
constexpr float kWeightOffset = (15.0f + kOwnExponent - 0.043f) / kWeightRange;

__device__ __forceinline__ uint32_t half_bits_of(__half2 pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ __half2 half_pair_of(uint32_t bits) {
  return reinterpret_cast<const __half2&>(bits);
}

// MINUS kOwnWeight times the weights of two keys, -infinity or NaN if they are too large. `factor`
// and `offset` turn scores into 1 / kWeightRange of logarithms. Each is two equal numbers.
__device__ __forceinline__ __half2 minus_weights(__half2 scores, __half2 factor, __half2 offset) {
  // From 0 to 1. NaN becomes 0.
  const __half2 exponent = __hfma2_sat(scores, factor, offset);
  // From 1 to 2. The mantissa has 32 steps for each power of two. Shifted left by five bits, they
  // are exponent and mantissa. The exponent's bits of 1 leave a sign, and a few lowest bits in the
  // second number.
  const __half2 steps =
      __hfma2(exponent, __float2half2_rn(kWeightRange / 32.0f), __float2half2_rn(1.0f));
  return half_pair_of(half_bits_of(steps) << 5);
}

}  // namespace pbs::cuda::sm90
