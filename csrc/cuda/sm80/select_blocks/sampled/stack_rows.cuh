// What a warp knows of its rows of sampled queries, and the sums of the weights that they give to
// keys, 32 keys each.
#pragma once

#include "common/exp2.cuh"
#include "common/mma_sync.cuh"
#include "common/select_blocks/sampled/pair_mask.cuh"
#include "pbs/sm80/sampled_tiles.h"
#include "sm80/tile_copy.cuh"

namespace pbs::cuda::sm80 {

// A weight larger than this times those of the own segment counts as if it were as large, so that
// all sums are finite.
constexpr float kMostAbove = 80.0f;  // powers of two

// kRowTiles times 16 rows of a unit, whose queries the warp has in registers. Of a row tile a lane
// has two rows of the products; of the sums it has those that row_of_sum says.
template <class Element, int kHeadDim, int kRowTiles>
class StackRows {
 public:
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kSumsPerStage = kStageKeys / kSumKeys;
  // Of a lane: sums of a stage, as many rows.
  static constexpr int kSumRows = kRowTiles == 4 ? 2 : 1;
  using KeyRead = TileRead<kHeadDim, kStageKeys>;

  __device__ StackRows(const SampledArgs& args, const SampledUnit& unit, int first_row)
      : lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(first_row),
        factor_(args.params.scale * kLog2e) {
    load_queries(args, unit);
    const bool exists = unit.pairs(first_row / kStackRows).count > 0;
    const SampledRow* rows =
        args.rows + stack_idx(args, unit.perm_head, unit.first_stack) * kStackRows;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) offset_[m][r] = exists ? rows[row(m, r)].offset : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSumRows; ++i) {
      candidate_end_[i] = exists ? rows[row_of_sum(i)].candidate_end : -1;
      own_sum_[i] = exists ? rows[row_of_sum(i)].own_sum : 0.0f;
      total_[i] = 0.0f;
    }
  }

  // The row of the unit that the lane's sum `i` belongs to.
  __device__ int row_of_sum(int i) const {
    const int quad = lane_ % 4;
    if constexpr (kRowTiles == 4) return first_row_ + 16 * quad + lane_ / 4 + 8 * i;
    if constexpr (kRowTiles == 2) return first_row_ + quad / 2 * 16 + quad % 2 * 8 + lane_ / 4;
    return first_row_ + quad % 2 * 8 + lane_ / 4;
  }
  // Where two lanes have the same sum, one of them writes it.
  __device__ bool writes_sums() const { return kRowTiles > 1 || lane_ % 4 < 2; }

  // Sums of a stage of keys, of which first_key is the first.
  __device__ __forceinline__ void add(const char* stage, int first_key,
                                      float (&sums)[kSumsPerStage][kSumRows]) {
    const KeyRead keys(stage, lane_ % 8, lane_ / 8);
#pragma unroll
    for (int nth = 0; nth < kSumsPerStage; ++nth) {
      float parts[kRowTiles * kThreadRows] = {};
#pragma unroll
      for (int eighth = 0; eighth < kSumKeys / 8; ++eighth) {
        add_eight(keys, nth * kSumKeys + eighth * 8, parts);
      }
      share_quad(parts, sums[nth]);
      const int begin = first_key + nth * kSumKeys;
#pragma unroll
      for (int i = 0; i < kSumRows; ++i) {
        // Candidates are whole sums. What lies behind them weighs nothing, whatever it is.
        const float sum = begin < candidate_end_[i] ? sums[nth][i] : 0.0f;
        sums[nth][i] = sum;
        total_[i] += sum;
      }
    }
  }

  // What the weights of a row are to be multiplied by, as two equal bfloat16.
  __device__ void write_weights(uint32_t* weights) const {
    if (!writes_sums()) return;
#pragma unroll
    for (int i = 0; i < kSumRows; ++i) {
      const float total = total_[i] + own_sum_[i];
      // A row that does not exist weighs nothing; in one that sees nothing all shares are 0.
      const float weight = candidate_end_[i] >= 0 && total != 0.0f ? 1.0f / total : 0.0f;
      weights[row_of_sum(i)] = bits_of(__float2bfloat162_rn(weight));
    }
  }

 private:
  // Of the unit.
  __device__ int row(int m, int r) const { return first_row_ + 16 * m + lane_ / 4 + 8 * r; }

  // NaN stays NaN.
  __device__ static float limited(float above) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(above), "f"(kMostAbove));
    return least;
  }

  // A lane's elements of both of its rows in every row tile, as products take them.
  __device__ void load_queries(const SampledArgs& args, const SampledUnit& unit) {
    const ConstRows& q = args.params.q;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const int in_unit = row(m, r);
        const Sample sample =
            sample_of(args, unit, unit.pairs(in_unit / kStackRows), in_unit % kStackRows);
        const Element* from =
            static_cast<const Element*>(q.data) +
            row_start(q, RowPlace{unit.b, sample.block.first_row + sample.row}, sample.hq) +
            lane_ % 4 * 2;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            queries_[m][step][2 * half + r] =
                sample.exists ? *reinterpret_cast<const uint32_t*>(from + 16 * step + 8 * half) : 0;
          }
        }
      }
    }
  }

  // Adds the weights of 8 keys, of which the first is row `key` of the stage.
  __device__ __forceinline__ void add_eight(const KeyRead& keys, int key,
                                            float (&parts)[kRowTiles * kThreadRows]) {
    float scores[kRowTiles][4] = {};
    multiply(keys, key, scores);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        parts[m * kThreadRows + row_of(i)] +=
            exp2_approx(limited(scores[m][i] * factor_ + offset_[m][row_of(i)]));
      }
    }
  }

  // Two steps at once: four matrices of 8 keys by 8 columns.
  __device__ __forceinline__ void multiply(const KeyRead& keys, int key,
                                           float (&scores)[kRowTiles][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t words[4];
      load_matrices(keys.at(step, key), words);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const uint32_t (&a)[4] = queries_[m][step + half];
          multiply_16x8x16<Element>(scores[m], a[0], a[1], a[2], a[3], words[2 * half],
                                    words[2 * half + 1]);
        }
      }
    }
  }

  // Adds up what the lanes of a quad have of each row, and leaves to each lane its own rows.
  __device__ __forceinline__ void share_quad(const float (&parts)[kRowTiles * kThreadRows],
                                             float (&sums)[kSumRows]) const {
    const bool is_odd = lane_ & 1;
    const bool is_upper = lane_ & 2;
    if constexpr (kRowTiles == 4) {
      float half[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) half[i] = exchanged(parts[i], parts[4 + i], is_upper, 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] = exchanged(half[i], half[2 + i], is_odd, 1);
    } else if constexpr (kRowTiles == 2) {
      const float first = exchanged(parts[0], parts[2], is_upper, 2);
      const float second = exchanged(parts[1], parts[3], is_upper, 2);
      sums[0] = exchanged(first, second, is_odd, 1);
    } else {
      const float sum = exchanged(parts[0], parts[1], is_odd, 1);
      sums[0] = sum + __shfl_xor_sync(~0u, sum, 2);
    }
  }

  // Of a lane that keeps the second of two values, or the first, and of its neighbour that keeps
  // the other: the sum of both lanes' values.
  __device__ __forceinline__ static float exchanged(float first, float second, bool keeps_second,
                                                    int mask) {
    const float received = __shfl_xor_sync(~0u, keeps_second ? first : second, mask);
    return (keeps_second ? second : first) + received;
  }

  int lane_;
  int first_row_;  // of the warp, in the unit
  float factor_;
  uint32_t queries_[kRowTiles][kSteps][4];
  float offset_[kRowTiles][kThreadRows];
  int candidate_end_[kSumRows];
  float own_sum_[kSumRows];
  float total_[kSumRows];
};

}  // namespace pbs::cuda::sm80
