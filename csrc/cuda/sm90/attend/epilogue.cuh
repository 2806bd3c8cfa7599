// Normalised output rows and log-sum-exp, from registers to memory.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "softmax.cuh"
#include "traits.cuh"

namespace pbs::cuda::sm90 {

// Word i of lane c of a quad becomes word c of lane i.
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

// The index of this thread, read anew: what is computed from it is not carried, in registers that
// the main loop lacks, from one block's end to the next one's.
__device__ inline int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

template <class Traits, class Output>
__device__ void write_rows(const AttendParams& params, const typename Traits::Work& work,
                           const Softmax& softmax, const Output& tOrO) {
  using Element = typename Traits::Element;
  const int thread = read_thread();
  const int lane = thread % 32;
  const int row = row_of_thread(thread - 128);
  CUTE_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    const float sum = quad_sum(softmax.row_sum[r]);
    const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    const int own_row = row + 8 * r;
    const bool is_inside = own_row < work.num_rows;
    if (is_inside && lane % 4 == 0) {
      const float log2_sum = softmax.base[r] + __log2f(sum);
      work.lse[own_row] = sum == 0.0f ? -INFINITY : log2_sum * 0.6931471805599453f;
    }
    uint4* out =
        reinterpret_cast<uint4*>(work.out + own_row * params.out.row_stride + lane % 4 * 8);
    // A quad holds 4 * 8 columns in 4 words a lane; transposed, each lane has 8 in a row.
    CUTE_UNROLL
    for (int group = 0; group < Traits::kHeadDim / 32; ++group) {
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
}

// A block that visits nothing: zeros, and log(0). Called by one warp.
template <class Traits>
__device__ void write_nothing(const AttendParams& params, const typename Traits::Work& work) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = 0; row < work.num_rows; ++row) {
    for (int column = lane * 8; column < Traits::kHeadDim; column += 256) {
      *reinterpret_cast<uint4*>(work.out + row * params.out.row_stride + column) = uint4{};
    }
  }
  for (int row = lane; row < work.num_rows; row += 32) work.lse[row] = -INFINITY;
}

}  // namespace pbs::cuda::sm90
