// Writes normalised output rows and the log-sum-exp from registers to memory.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "common/attend/draw.cuh"
#include "common/attend/softmax.cuh"

namespace pbs::cuda {

// Transposes words in a quad: word i of lane c becomes word c of lane i.
__device__ inline void transpose_quad(uint32_t (&words)[4], int lane) {
  const bool is_odd = lane & 1;
  CUTE_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = __shfl_xor_sync(~0u, is_odd ? words[i] : words[i + 1], 1);
    words[i] = is_odd ? received : words[i];
    words[i + 1] = is_odd ? words[i + 1] : received;
  }
  const bool is_upper = lane & 2;
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, is_upper ? words[i] : words[i + 2], 2);
    words[i] = is_upper ? received : words[i];
    words[i + 2] = is_upper ? words[i + 2] : received;
  }
}

// Writes row r of a thread, which is row `row` of the query block.
template <int kHeadDim, class Element, class Output>
__device__ __forceinline__ void write_row(const AttendWork<Element>& work, int64_t row_stride,
                                          const Softmax& softmax, const Output& tOrO, int r,
                                          int row, int lane) {
  const float sum = quad_sum(softmax.row_sum[r]);
  const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  const bool is_inside = row < work.num_rows;
  if (is_inside && lane % 4 == 0) {
    const float log2_sum = softmax.base[r] + __log2f(sum);
    work.lse[row] = sum == 0.0f ? -INFINITY : log2_sum * 0.6931471805599453f;
  }
  uint4* out = reinterpret_cast<uint4*>(work.out + row * row_stride + lane % 4 * 8);
  // A quad has 4 * 8 columns in 4 words per lane. After the transpose, each lane has 8 in a row.
  CUTE_UNROLL
  for (int group = 0; group < kHeadDim / 32; ++group) {
    uint32_t words[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = (group * 4 + i) * 4 + 2 * r;
      cutlass::NumericArrayConverter<Element, float, 2> convert;
      const cutlass::Array<float, 2> pair{tOrO(at) * inverse, tOrO(at + 1) * inverse};
      const cutlass::Array<Element, 2> rounded = convert(pair);
      words[i] = *reinterpret_cast<const uint32_t*>(&rounded);
    }
    transpose_quad(words, lane);
    if (is_inside) out[group * 4] = uint4{words[0], words[1], words[2], words[3]};
  }
}

// Writes the rows of a block that visits nothing: zeros, and log(0). Called by one warp.
template <int kHeadDim, class Element>
__device__ void write_nothing(const AttendWork<Element>& work, int64_t row_stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = 0; row < work.num_rows; ++row) {
    for (int column = lane * 8; column < kHeadDim; column += 256) {
      *reinterpret_cast<uint4*>(work.out + row * row_stride + column) = uint4{};
    }
  }
  for (int row = lane; row < work.num_rows; row += 32) work.lse[row] = -INFINITY;
}

}  // namespace pbs::cuda
