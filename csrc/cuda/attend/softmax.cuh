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

// By how many powers of two a row's sums may outgrow the maximum that they are relative to before
// that maximum moves. A weight is then at most 2^8, far from the end of float16, and a maximum
// that creeps up tile by tile costs nothing.
constexpr float kMaxGrowth = 8.0f;

struct Softmax {
  float scale_log2 = 0.0f;                              // scale * log2(e)
  float row_max[kThreadRows] = {-INFINITY, -INFINITY};  // of unscaled scores, up to kMaxGrowth
  float base[kThreadRows] = {};                         // row_max in powers of two, 0 for -inf
  float row_sum[kThreadRows] = {};                      // this thread's columns only

  // Looks at new scores. True, for the whole warp, if a base moved: what was summed against the
  // older one must then shrink by rescale.
  template <class Scores>
  __device__ bool raise(const Scores& scores, float (&rescale)[kThreadRows]) {
    // Two chains a row, so that neighbours in program order do not wait for each other.
    float top[kThreadRows][2];
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      float& chain = top[row_of(i)][i % 2];
      chain = i < 4 ? scores(i) : fmaxf(chain, scores(i));
    }
    const float margin = kMaxGrowth / scale_log2;
    bool is_higher = false;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      top[r][0] = fmaxf(top[r][0], top[r][1]);
      is_higher |= top[r][0] > row_max[r] + margin;
    }
    const bool moves = __any_sync(~0u, is_higher);
    if (moves) {
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) move_base(r, quad_max(top[r][0]), rescale[r]);
    }
    return moves;
  }

  // exp2(scale_log2 * score - base) in two steps.
  template <class Scores>
  __device__ void shift(Scores& scores) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      scores(i) = scores(i) * scale_log2 - base[row_of(i)];
    }
  }

  template <class Scores>
  __device__ void exponentiate(Scores& scores) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) scores(i) = exp2_approx(scores(i));
  }

  // Far elements first, in pairs: ptxas starts exponentials in the order in which their sums need
  // them, and a sum of neighbours would wait for the one that was started just before.
  template <class Weights>
  __device__ void add(const Weights& weights) {
    constexpr int kHalf = cute::size(typename Weights::layout_type{}) / 2;
    float sum[kThreadRows][2];
    CUTE_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      float& chain = sum[row_of(i)][i % 2];
      const float pair = weights(i) + weights(i + kHalf);
      chain = i < 4 ? pair : chain + pair;
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) row_sum[r] += sum[r][0] + sum[r][1];
  }

 private:
  __device__ void move_base(int r, float top, float& rescale) {
    const bool is_first = row_max[r] == -INFINITY;
    const float old_base = base[r];
    row_max[r] = fmaxf(row_max[r], top);
    base[r] = row_max[r] == -INFINITY ? 0.0f : row_max[r] * scale_log2;
    rescale = is_first ? 0.0f : exp2_approx(old_base - base[r]);
    row_sum[r] *= rescale;
  }
};

}  // namespace pbs::cuda
