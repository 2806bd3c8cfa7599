// The work of a warp: the scores of its query rows against a tile of keys, their softmax, and the
// weighted sum of the tile's values.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "common/attend/softmax.cuh"
#include "common/attend/write_rows.cuh"
#include "common/mma_sync.cuh"
#include "traits.cuh"

namespace pbs::cuda::sm80 {

template <class Traits>
class RowTiles {
 public:
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using Work = typename Traits::Work;

  __device__ RowTiles(const Shared& shared, int thread, float scale_log2)
      : shared_(shared), thread_(thread) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      softmax_[m] = Softmax{scale_log2};
      cute::clear(output_[m]);
    }
  }

  // Whether the last row of the warp, which sees the most keys, sees a key of the tile.
  __device__ bool sees_some(const KeyTiles& tiles, int tile_idx) const {
    return visible_keys(tiles, tile_idx, first_row(renewed(thread_)) + 16 * kRowTiles - 1,
                        Traits::kKeys) > 0;
  }

  // S = Q . K^T, for the tile of keys in shared memory.
  __device__ __forceinline__ void multiply_keys() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) cute::clear(scores_[m]);
    const int thread = renewed(thread_);
    const int lane = thread % 32;
    const typename Traits::QueryRead queries(shared_.q, first_row(thread) + lane % 16, lane / 16);
    const typename Traits::KeyRead keys(shared_.k, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_matrices(queries.at(step, 16 * m), q[m]);
#pragma unroll
      for (int pair = 0; pair < Traits::kKeys / 16; ++pair) {
        uint32_t k[4];
        load_matrices(keys.at(step, 16 * pair), k);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(scores_[m], 2 * pair, q[m], k[0], k[1]);
          multiply(scores_[m], 2 * pair + 1, q[m], k[2], k[3]);
        }
      }
    }
  }

  // Hides the keys of a tile that rows do not see.
  __device__ __forceinline__ void mask(const KeyTiles& tiles, int tile_idx) {
    const int thread = renewed(thread_);
    const int lane = thread % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const int row = first_row(thread) + lane / 4 + 16 * m + 8 * r;
        // Compares with constants, counted from the first column of this lane.
        const int limit = visible_keys(tiles, tile_idx, row, Traits::kKeys) - column_of(0, lane);
#pragma unroll
        for (int i = 0; i < cute::size(scores_[m]); ++i) {
          if (row_of(i) == r && column_of(i, 0) >= limit) scores_[m](i) = -INFINITY;
        }
      }
    }
  }

  // Turns scores into weights. If a maximum moved, the earlier sums are rescaled.
  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      float rescale[kThreadRows];
      if (softmax_[m].raise(scores_[m], rescale)) {
#pragma unroll
        for (int i = 0; i < cute::size(output_[m]); ++i) output_[m](i) *= rescale[row_of(i)];
      }
      softmax_[m].add(softmax_[m].weigh_any(scores_[m]));
    }
  }

  // O += P . V, for the tile of values in shared memory.
  __device__ __forceinline__ void multiply_values() {
    const int lane = renewed(thread_) % 32;
    const typename Traits::KeyRead values(shared_.v, lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < Traits::kKeys / 16; ++step) {
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[m][i] = rounded_pair(scores_[m], 8 * step + 2 * i);
      }
#pragma unroll
      for (int pair = 0; pair < Traits::kHeadDim / 16; ++pair) {
        uint32_t v[4];
        load_transposed(values.at(pair, 16 * step), v);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(output_[m], 2 * pair, p[m], v[0], v[1]);
          multiply(output_[m], 2 * pair + 1, p[m], v[2], v[3]);
        }
      }
    }
  }

  __device__ void write(const Work& work, int64_t row_stride) const {
    const int thread = renewed(thread_);
    const int lane = thread % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        write_row<Traits::kHeadDim>(work, row_stride, softmax_[m], output_[m], r,
                                    first_row(thread) + lane / 4 + 16 * m + 8 * r, lane);
      }
    }
  }

 private:
  static constexpr int kRowTiles = Traits::kRowTiles;

  // The first row of the warp.
  __device__ static int first_row(int thread) { return thread / 32 * 16 * kRowTiles; }

  // Adds to 8 columns of the accumulators.
  template <class Accumulators>
  __device__ __forceinline__ static void multiply(Accumulators& acc, int eight,
                                                  const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    float (&four)[4] = *reinterpret_cast<float (*)[4]>(&acc(4 * eight));
    multiply_16x8x16<Element>(four, a[0], a[1], a[2], a[3], b0, b1);
  }

  template <class Scores>
  __device__ __forceinline__ static uint32_t rounded_pair(const Scores& weights, int i) {
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    const cutlass::Array<Element, 2> pair =
        convert(cutlass::Array<float, 2>{weights(i), weights(i + 1)});
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  const Shared& shared_;
  int thread_;
  Softmax softmax_[kRowTiles];
  typename Traits::Output output_[kRowTiles];
  typename Traits::Scores scores_[kRowTiles];
};

}  // namespace pbs::cuda::sm80
