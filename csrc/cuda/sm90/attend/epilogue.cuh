// Writes a warpgroup's output rows and log-sum-exp from registers to memory.
#pragma once

#include "common/attend/write_rows.cuh"
#include "traits.cuh"

namespace pbs::cuda::sm90 {

template <class Traits, class Output>
__device__ void write_rows(const AttendParams& params, const typename Traits::Work& work,
                           const Softmax& softmax, const Output& tOrO) {
  const int thread = read_thread();
  const int row = row_of_thread(thread - 128);
  CUTE_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    write_row<Traits::kHeadDim>(work, params.out.row_stride, softmax, tOrO, r, row + 8 * r,
                                thread % 32);
  }
}

}  // namespace pbs::cuda::sm90
