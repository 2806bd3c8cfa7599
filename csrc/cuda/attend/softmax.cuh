// Online softmax over the accumulators of one warpgroup.
//
// A thread of the warpgroup holds two rows, 8 apart: element i of an accumulator belongs to row
// i / 2 % 2 and column 8 * (i / 4) + 2 * (lane % 4) + i % 2, and the four lanes of a quad share
// their rows.
#pragma once

#include <cute/tensor.hpp>

namespace pbs::cuda {

constexpr int kThreadRows = 2;

__device__ inline int row_of(int i) { return i / 2 % 2; }
__device__ inline int column_of(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// One instruction; accurate to 2 ulp, and 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

struct Softmax {
  float scale_log2;                                     // scale * log2(e)
  float row_max[kThreadRows] = {-INFINITY, -INFINITY};  // of unscaled scores
  float row_sum[kThreadRows] = {};                      // this thread's columns only

  // Turns scores into exp2(scale * (score - max)); returns by how much older sums must shrink.
  template <class Scores>
  __device__ void fold(Scores& scores, float (&rescale)[kThreadRows]) {
    float top[kThreadRows] = {row_max[0], row_max[1]};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      top[row_of(i)] = fmaxf(top[row_of(i)], scores(i));
    }
    float base[kThreadRows];
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      top[r] = quad_max(top[r]);
      // A row that has seen nothing keeps -inf; subtracting it from itself would give NaN.
      base[r] = top[r] == -INFINITY ? 0.0f : top[r] * scale_log2;
      rescale[r] = exp2_approx(row_max[r] * scale_log2 - base[r]);
      row_max[r] = top[r];
      row_sum[r] *= rescale[r];
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      scores(i) = exp2_approx(scores(i) * scale_log2 - base[row_of(i)]);
      row_sum[row_of(i)] += scores(i);
    }
  }
};

}  // namespace pbs::cuda
