// Online softmax over accumulators, with two rows per thread.
#pragma once

#include <cute/tensor.hpp>

#include "common/exp2.cuh"
#include "common/fragments.cuh"

namespace pbs::cuda {

// A weight may exceed the base of its row by this many powers of two before the base moves. The
// limit is far below the end of float16, and a maximum that grows slowly from tile to tile costs
// nothing.
constexpr float kMaxGrowth = 8.0f;
constexpr float kMaxSum = 256.0f;  // 2^kMaxGrowth
// If a sum is no larger, no weight has left the range of float32.
constexpr float kMaxFiniteSum = 0x1p100f;

// The share of one thread in the sums of a tile's weights.
struct TileSums {
  float row[kThreadRows];
};

struct Softmax {
  float scale_log2 = 0.0f;                           // scale * log2(e)
  float base[kThreadRows] = {-INFINITY, -INFINITY};  // close to the maximum, in powers of two
  float row_sum[kThreadRows] = {};                   // over this thread's columns only

  // Reads new scores. Returns true, for the whole warp, if a base moved. Earlier sums must then be
  // multiplied by rescale.
  template <class Scores>
  __device__ bool raise(const Scores& scores, float (&rescale)[kThreadRows]) {
    float top[kThreadRows];
    row_maxima(scores, top);
    bool is_higher = false;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) is_higher |= top[r] * scale_log2 > base[r] + kMaxGrowth;
    const bool moves = __any_sync(~0u, is_higher);
    if (moves) {
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        move_base(r, fmaxf(base[r], quad_max(top[r]) * scale_log2), rescale[r]);
      }
    }
    return moves;
  }

  // Turns scores into weights, exp2(scale_log2 * score - base). Distant elements are summed first,
  // in pairs: ptxas starts exponentials in the order in which their sums need them, and a sum of
  // neighbours would wait for the exponential that was started just before.
  template <class Scores>
  __device__ TileSums weigh(Scores& scores) const {
    return weigh(scores, base);
  }

  // The same if some rows may not have seen any key yet.
  template <class Scores>
  __device__ TileSums weigh_any(Scores& scores) const {
    const float finite[kThreadRows] = {base[0] == -INFINITY ? 0.0f : base[0],
                                       base[1] == -INFINITY ? 0.0f : base[1]};
    return weigh(scores, finite);
  }

  // Returns true, for the whole warp, if some weights are too large or NaN.
  __device__ static bool outgrow(const TileSums& sums) {
    return __any_sync(~0u, !(sums.row[0] <= kMaxSum && sums.row[1] <= kMaxSum));
  }

  // Returns true, for the whole warp, if weights are out of range.
  __device__ static bool is_lost(const TileSums& sums) {
    return __any_sync(~0u, !(sums.row[0] <= kMaxFiniteSum && sums.row[1] <= kMaxFiniteSum));
  }

  // Moves the bases to the maxima of the weights, and rescales the weights and their sums.
  template <class Weights>
  __device__ void shrink(Weights& weights, TileSums& sums, float (&rescale)[kThreadRows]) {
    float top[kThreadRows];
    row_maxima(weights, top);
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      move_base(r, base[r] + fmaxf(0.0f, __log2f(quad_max(top[r]))), rescale[r]);
      sums.row[r] *= rescale[r];
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(weights); ++i) weights(i) *= rescale[row_of(i)];
  }

  __device__ void add(const TileSums& sums) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) row_sum[r] += sums.row[r];
  }

 private:
  // Finds the maxima of this thread's columns. Each row has two chains, so that neighbouring
  // instructions do not wait for each other.
  template <class Values>
  __device__ static void row_maxima(const Values& values, float (&top)[kThreadRows]) {
    float chains[kThreadRows][2];
    CUTE_UNROLL
    for (int i = 0; i < cute::size(values); ++i) {
      float& chain = chains[row_of(i)][i % 2];
      chain = i < 4 ? values(i) : fmaxf(chain, values(i));
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) top[r] = fmaxf(chains[r][0], chains[r][1]);
  }

  template <class Scores>
  __device__ TileSums weigh(Scores& scores, const float (&bases)[kThreadRows]) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      scores(i) = exp2_approx(scores(i) * scale_log2 - bases[row_of(i)]);
    }
    constexpr int kHalf = cute::size(typename Scores::layout_type{}) / 2;
    float chains[kThreadRows][2];
    CUTE_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      float& chain = chains[row_of(i)][i % 2];
      const float pair = scores(i) + scores(i + kHalf);
      chain = i < 4 ? pair : chain + pair;
    }
    TileSums sums;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) sums.row[r] = chains[r][0] + chains[r][1];
    return sums;
  }

  __device__ void move_base(int r, float new_base, float& rescale) {
    rescale = base[r] == -INFINITY ? 0.0f : exp2_approx(base[r] - new_base);
    row_sum[r] *= rescale;
    base[r] = new_base;
  }
};

}  // namespace pbs::cuda
