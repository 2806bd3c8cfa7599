// Rows that stream past the blocks of score_keys. They are copied to a ring of stages in shared
// memory, which all warps read.
#pragma once

#include <cute/tensor.hpp>

#include "pbs/params.h"
#include "pbs/sm80/score_parts.h"
#include "sm80/tile_copy.cuh"

namespace pbs::cuda::sm80 {

struct ScoreArgs {
  ScoreKeysParams params;
  ScoreParts sums;        // first pass; each query head is a walk
  ScoreParts importance;  // second pass; each key head is a walk
  float2* state;   // (B, Hq, sums.num_parts, kScoreTileRows): maximum and sum of a query's weights
  float* shifts;   // (B, Hq, kScoreTileRows), in the order of place_of_shift
  int num_rows;    // queries per head
  int num_scored;  // keys per head
};

template <class Element_, int kHeadDim_>
struct ScoreTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kRowTiles = kScoreBlockRows / (16 * kScoreWarps);  // per warp
  static constexpr int kStageRows = score_stage_rows(kHeadDim);
  static constexpr int kNumStages = score_stages(kHeadDim);
  static constexpr int kBlockStages = kScoreBlockRows / kStageRows;  // per block
  // Accumulators of a row tile: rows of a stage are columns of the products.
  static constexpr int kColumns = 32;
  using Scores = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kColumns / 2>>{}));
  using Copy = TileCopy<kHeadDim, kStageRows, kScoreThreads>;
  using Read = TileRead<kHeadDim, kStageRows>;

  struct Stage {
    alignas(128) Element rows[kStageRows * kHeadDim];
    float shifts[kStageRows];  // only if the rows are queries
  };
  static_assert(sizeof(Stage) == score_stage_bytes(kHeadDim));
  static_assert(kNumStages >= 3);
};

// The contents of a stage. It has no rows if `rows` is null.
template <class Element>
struct StageRows {
  const Element* rows;
  int64_t row_stride;
  int num_rows;         // rows that exist; the others are zeros
  const float* shifts;  // or null
};

// Returns rows [first, first + num_rows) of a head, or no rows at the end.
template <class Element>
__device__ __forceinline__ StageRows<Element> stage_rows(const ConstRows& rows, int64_t b, int head,
                                                         int64_t first, int num_rows) {
  const RowPlace place{b, num_rows > 0 ? first : 0};
  return {static_cast<const Element*>(rows.data) + row_start(rows, place, head), rows.row_stride,
          num_rows, nullptr};
}

template <class Traits>
class ScoreRing {
 public:
  using Element = typename Traits::Element;
  using Stage = typename Traits::Stage;

  __device__ explicit ScoreRing(void* shared) : stages_(static_cast<Stage*>(shared)) {}

  // Walk::next() returns the contents of each stage.
  template <class Walk>
  __device__ __forceinline__ void start(Walk& walk) {
#pragma unroll
    for (int i = 0; i < Traits::kNumStages - 1; ++i) fill(i, walk.next());
  }

  // Waits for the next stage, and refills the previous one.
  template <class Walk>
  __device__ __forceinline__ const Stage& advance(Walk& walk) {
    wait_for_copies<Traits::kNumStages - 2>();
    __syncthreads();  // the stage is loaded, and all warps have finished with the previous one
    fill(stage_ == 0 ? Traits::kNumStages - 1 : stage_ - 1, walk.next());
    const Stage& stage = stages_[stage_];
    stage_ = stage_ == Traits::kNumStages - 1 ? 0 : stage_ + 1;
    return stage;
  }

 private:
  __device__ __forceinline__ void fill(int idx, const StageRows<Element>& from) {
    constexpr int kRows = Traits::kStageRows;
    Stage& stage = stages_[idx];
    if (from.rows != nullptr) {
      Traits::Copy::template start<kRows>(static_cast<int>(threadIdx.x), stage.rows, 0, from.rows,
                                          from.row_stride, from.num_rows);
    }
    const int first = static_cast<int>(threadIdx.x) * 4;
    if (from.shifts != nullptr && first < kRows) {
      copy_piece(shared_address(stage.shifts + first), from.shifts + first, true);
    }
    commit_copies();
  }

  Stage* stages_;
  int stage_ = 0;
};

}  // namespace pbs::cuda::sm80
