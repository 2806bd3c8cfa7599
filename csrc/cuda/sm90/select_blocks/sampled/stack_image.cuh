// The sampled queries of a stack in e4m3, in the layout of shared memory.
#pragma once

#include "common/select_blocks/sampled/sample_queries.cuh"
#include "layout.cuh"
#include "weights.cuh"

namespace pbs::cuda::sm90 {

// The rounding of an offset may move the own segment by this many powers of two.
constexpr float kMostOwnShift = 4.0f;

template <int kHeadDim>
class StackImage {
 public:
  __device__ StackImage(const SampledArgs& args, int64_t stack_idx)
      : image_(args.stacks + stack_idx * stack_bytes(kHeadDim)) {}

  // The kernel that copies keys may start, because it does not depend on this one.
  __device__ static void begin() { cudaTriggerProgrammaticLaunchCompletion(); }

  // Writes a row, of which the lanes of a quad have pieces. Returns the scale of its elements.
  template <class Element, int kChunks>
  __device__ float write(int row, const Words (&query)[kChunks]) const {
    uint32_t largest = 0;
#pragma unroll
    for (const Words& words : query) {
      const auto values = floats<Element>(words);
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = max(largest, magnitude(values[e]));
    }
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    const NarrowScale scale(largest);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const auto narrow = narrowed(floats<Element>(query[i]), scale.inverse);
      const int column = 32 * i + static_cast<int>(threadIdx.x) % 4 * 8;
      const int place = typename SampledLayouts<kHeadDim>::Stack{}(row, column);
      *reinterpret_cast<uint2*>(image_ + place) = reinterpret_cast<const uint2&>(narrow);
    }
    return scale.scale;
  }

  // Computed from the logarithm of the own keys' weights. If half precision cannot hold it, it is
  // NaN, which selects everything.
  __device__ static void set_own(SampledRow& state, float log2_own, bool has_own) {
    state.offset = __half2float(__float2half_rn(kWeightOffset - log2_own * (1.0f / kWeightRange)));
    const float rest = log2_own + (state.offset - kWeightOffset) * kWeightRange;
    state.own_sum = has_own ? exp2_approx(rest) : 0.0f;
    if (!(fabsf(rest) < kMostOwnShift)) state.own_sum = NAN;
  }

 private:
  template <class Element>
  __device__ static cutlass::Array<float, 8> floats(const Words& words) {
    return cutlass::NumericArrayConverter<float, Element, 8>()(
        reinterpret_cast<const cutlass::Array<Element, 8>&>(words));
  }

  char* image_;
};

}  // namespace pbs::cuda::sm90
