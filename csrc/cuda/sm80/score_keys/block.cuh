// The rows that a CTA of score_keys holds in registers, and their products.
#pragma once

#include "common/mma_sync.cuh"
#include "stages.cuh"

namespace pbs::cuda::sm80 {

template <class Traits>
class ScoreBlock {
 public:
  using Stage = typename Traits::Stage;
  using Scores = typename Traits::Scores;

  __device__ ScoreBlock()
      : lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(static_cast<int>(threadIdx.x) / 32 * 16 * Traits::kRowTiles) {}

  __device__ int lane() const { return lane_; }
  // The thread's first row of a row tile.
  __device__ int row(int m) const { return first_row_ + 16 * m + lane_ / 4; }

  // Loads the rows of the warp if they are in the nth stage of the block.
  __device__ __forceinline__ void load(const Stage& stage, int nth) {
    if (first_row_ / Traits::kStageRows != nth) return;
    const typename Traits::Read read(stage.rows, first_row_ % Traits::kStageRows + lane_ % 16,
                                     lane_ / 16);
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
      for (int step = 0; step < Traits::kSteps; ++step) {
        load_matrices(read.at(step, 16 * m), rows_[m][step]);
      }
    }
  }

  // The products of the warp's rows by kColumns rows of the stage, starting with `first`.
  __device__ __forceinline__ void multiply(const Stage& stage, int first,
                                           Scores (&scores)[Traits::kRowTiles]) const {
    const typename Traits::Read read(stage.rows, lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) cute::clear(scores[m]);
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < Traits::kColumns / 16; ++pair) {
        uint32_t columns[4];
        load_matrices(read.at(step, first + 16 * pair), columns);
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          add_product(scores[m], 2 * pair, rows_[m][step], columns[0], columns[1]);
          add_product(scores[m], 2 * pair + 1, rows_[m][step], columns[2], columns[3]);
        }
      }
    }
  }

 private:
  // Adds to 8 columns of the accumulators.
  __device__ __forceinline__ static void add_product(Scores& scores, int eight,
                                                     const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
    float (&four)[4] = *reinterpret_cast<float (*)[4]>(&scores(4 * eight));
    multiply_16x8x16<typename Traits::Element>(four, a[0], a[1], a[2], a[3], b0, b1);
  }

  int lane_;
  int first_row_;  // first row of the warp
  uint32_t rows_[Traits::kRowTiles][Traits::kSteps][4];
};

}  // namespace pbs::cuda::sm80
