// The weights of keys, from scores in half precision, two at a time.
//
// The special function unit would take longer than the products. So a weight is a straight line
// between powers of two, within 5 % with all roundings. It needs the bits of half precision only: 5
// of exponent and 10 of mantissa are one number of 15 bits that grows linearly with the logarithm.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace pbs::cuda::sm90 {

// Half precision holds powers of two from -15 to 16. The keys of the own segment together weigh
// 2^kOwnExponent: what is 2^20 times less counts as nothing, and what is 2^11 times more is found
// to be infinite.
constexpr float kWeightRange = 31.0f;
constexpr int kOwnExponent = 5;
constexpr float kOwnWeight = 1 << kOwnExponent;
// A straight line is up to 1.061 times a power of two: half of it is taken off.
constexpr float kWeightOffset = (15.0f + kOwnExponent - 0.043f) / kWeightRange;

__device__ __forceinline__ uint32_t half_bits_of(__half2 pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ __half2 half_pair_of(uint32_t bits) {
  return reinterpret_cast<const __half2&>(bits);
}

// MINUS kOwnWeight times the weights of two keys, -infinity or NaN where they are too large.
// `factor` and `offset` are 1 / kWeightRange of what makes logarithms of scores, two equal ones.
__device__ __forceinline__ __half2 minus_weights(__half2 scores, __half2 factor, __half2 offset) {
  // From 0 to 1, and a NaN becomes 0.
  const __half2 exponent = __hfma2_sat(scores, factor, offset);
  // From 1 to 2, whose mantissa has 32 steps for each power of two. Five bits further left they are
  // exponent and mantissa; the exponent's bits of 1 leave a sign, and a few lowest bits of the
  // second number.
  const __half2 steps =
      __hfma2(exponent, __float2half2_rn(kWeightRange / 32.0f), __float2half2_rn(1.0f));
  return half_pair_of(half_bits_of(steps) << 5);
}

}  // namespace pbs::cuda::sm90
