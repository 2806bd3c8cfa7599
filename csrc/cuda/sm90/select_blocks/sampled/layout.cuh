// One-byte operands: where the elements of a stack and of a tile are in shared memory, and in their
// copies in device memory.
#pragma once

#include <cutlass/float8.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "pbs/sm90/sampled_tiles.h"

namespace pbs::cuda::sm90 {

using Narrow = cutlass::float_e4m3_t;
// The largest operand after scaling: large enough that few operands are subnormal, small enough
// that the sum of 256 products fits in half precision.
constexpr float kMostNarrow = 15.0f;

template <int kHeadDim>
struct SampledLayouts {
  using Rows = cute::Int<kStackRows>;
  using Columns = cute::Int<kSampledKeys>;
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::MMA_64x128x32_F16E4M3E4M3_SS_TN<cute::GMMA::ScaleIn::One,
                                                        cute::GMMA::ScaleIn::One>{}));
  template <class NumRows>
  using Atom =
      decltype(cutlass::gemm::collective::detail::ss_smem_selector<cute::GMMA::Major::K, Narrow,
                                                                   NumRows, cute::Int<kHeadDim>>());
  using Stack =
      decltype(cute::tile_to_shape(Atom<Rows>{}, cute::Shape<Rows, cute::Int<kHeadDim>>{}));
  using Tile =
      decltype(cute::tile_to_shape(Atom<Columns>{}, cute::Shape<Columns, cute::Int<kHeadDim>>{}));
};

// The bits of the absolute value as an integer, which has the same order, including infinity and
// NaN.
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The divisor that maps the largest of some numbers to kMostNarrow. If one is infinite or NaN, so
// is the scale, and all scores with it.
struct NarrowScale {
  float scale;
  float inverse;

  __device__ explicit NarrowScale(uint32_t largest) {
    const float top = __uint_as_float(largest);
    scale = top * (1.0f / kMostNarrow);
    inverse = top > 0.0f ? kMostNarrow / top : 0.0f;
    if (isinf(inverse)) scale = inverse = 0.0f;  // all numbers are nearly 0
  }
};

template <int kSize>
__device__ cutlass::Array<Narrow, kSize> narrowed(const cutlass::Array<float, kSize>& values,
                                                  float inverse) {
  cutlass::Array<float, kSize> scaled;
  CUTE_UNROLL
  for (int i = 0; i < kSize; ++i) scaled[i] = values[i] * inverse;
  return cutlass::NumericArrayConverter<Narrow, float, kSize>()(scaled);
}

}  // namespace pbs::cuda::sm90
