// The rows of sampled queries of a warp, and the sums of their weights over 32 keys each.
#pragma once

#include "common/exp2.cuh"
#include "common/mma_sync.cuh"
#include "common/select_blocks/sampled/pair_mask.cuh"
#include "pbs/sm80/sampled_tiles.h"
#include "sm80/tile_copy.cuh"

namespace pbs::cuda::sm80 {

// A weight is limited to this factor times the weights of the own segment, so that all sums are
// finite.
constexpr float kMostAbove = 80.0f;  // powers of two
// No weight of a smaller sum reaches the limit.
constexpr float kSmallSum = 0x1p80f;

// Whether the loop over the sums of a stage is unrolled, which lets the first products of the
// second sum overlap with the first sum. With few columns, ptxas then issues all products before
// any exponential, which is slower and spills on some architectures. With 256, it spills on sm_100.
template <int kHeadDim, int kRowTiles>
__device__ constexpr bool unrolls_sums() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000
  if (kHeadDim == 256) return false;
#endif
  return kRowTiles < 4 || kHeadDim >= 128;
}

// kRowTiles times 16 rows of a unit, whose queries the warp has in registers. In a row tile, a lane
// has two rows of the products. It has the sums of the rows that row_of_sum returns.
template <class Element, int kHeadDim, int kRowTiles>
class StackRows {
 public:
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kSumsPerStage = kStageKeys / kSumKeys;
  static constexpr int kUnrolledSums = unrolls_sums<kHeadDim, kRowTiles>() ? kSumsPerStage : 1;
  // The sums of a stage in a lane, one per row.
  static constexpr int kSumRows = kRowTiles == 4 ? 2 : 1;
  // Groups of eight keys that are multiplied together. With few row tiles, one group has too few
  // independent products to hide their latency.
  static constexpr int kEights = kRowTiles == 4 ? 1 : 2;
  static constexpr int kMultipliesPerSum = kSumKeys / (8 * kEights);
  static_assert(kMultipliesPerSum % 2 == 0, "in a loop over sums, scores alternate");
  using KeyRead = TileRead<kHeadDim, kStageKeys>;

  __device__ StackRows(const SampledArgs& args, const SampledUnit& unit) : args_(args) {
    load_queries(args, unit);
    const bool exists = unit.pairs(first_row() / kStackRows).count > 0;
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
      total_[i] = 0.0f;
    }
  }

  // The row of the unit that the lane's sum `i` belongs to.
  __device__ static int row_of_sum(int i) {
    const int lane = read_thread() % 32;
    const int quad = lane % 4;
    if constexpr (kRowTiles == 4) return first_row() + 16 * quad + lane / 4 + 8 * i;
    if constexpr (kRowTiles == 2) return first_row() + quad / 2 * 16 + quad % 2 * 8 + lane / 4;
    return first_row() + quad % 2 * 8 + lane / 4;
  }
  // If two lanes have the same sum, one of them writes it.
  __device__ static bool writes_sums() { return kRowTiles > 1 || read_thread() % 4 < 2; }

  // The sums of a stage of keys that starts with first_key.
  __device__ __forceinline__ void add(const char* stage, int first_key,
                                      float (&sums)[kSumsPerStage][kSumRows]) {
    const int lane = read_thread() % 32;
    const KeyRead keys(stage, lane % 8, lane / 8);
    float scores[2][kEights][kRowTiles][4];
    float parts[kRowTiles * kThreadRows];
    bool is_small = true;
    multiply(keys, 0, scores[0]);
#pragma unroll kUnrolledSums
    for (int nth = 0; nth < kSumsPerStage; ++nth) {
      clear(parts);
#pragma unroll
      for (int i = 0; i < kMultipliesPerSum; ++i) {
        // The products of the next keys overlap with the exponentials of these keys.
        const int next = nth * kSumKeys + (i + 1) * 8 * kEights;
        if (next < kStageKeys) multiply(keys, next, scores[(i + 1) % 2]);
#pragma unroll
        for (const auto& eight : scores[i % 2]) {
          weigh<false>(eight, parts);
        }
      }
      push(parts, sums);
#pragma unroll
      for (float sum : sums[kSumsPerStage - 1]) is_small &= sum < kSmallSum;
    }
    if (!__all_sync(~0u, is_small)) add_limited(keys, sums);
#pragma unroll
    for (int nth = 0; nth < kSumsPerStage; ++nth) {
#pragma unroll
      for (int i = 0; i < kSumRows; ++i) {
        // Sums contain candidates only, or none. Keys after the candidates have weight 0, whatever
        // their values.
        const bool is_candidate = first_key + nth * kSumKeys < candidate_end_[i];
        sums[nth][i] = is_candidate ? sums[nth][i] : 0.0f;
        total_[i] += sums[nth][i];
      }
    }
  }

  // Returns the factor for the weights of a row, as two equal bfloat16.
  __device__ void write_weights(const SampledUnit& unit, uint32_t* weights) const {
    if (!writes_sums()) return;
    const SampledRow* rows =
        args_.rows + stack_idx(args_, unit.perm_head, unit.first_stack) * kStackRows;
#pragma unroll
    for (int i = 0; i < kSumRows; ++i) {
      // A row that does not exist has factor 0. In a row that sees nothing, all shares are 0.
      const bool exists = candidate_end_[i] >= 0;
      const float total = total_[i] + (exists ? rows[row_of_sum(i)].own_sum : 0.0f);
      const float weight = exists && total != 0.0f ? 1.0f / total : 0.0f;
      weights[row_of_sum(i)] = bits_of(__float2bfloat162_rn(weight));
    }
  }

 private:
  // Rows of the unit: the first row of the warp, and of the lane in products.
  __device__ static int first_row() { return read_thread() / 32 * 16 * kRowTiles; }
  __device__ static int row(int m, int r) {
    return first_row() + 16 * m + read_thread() % 32 / 4 + 8 * r;
  }

  // An infinite score gives NaN, like a NaN score: dense attention gives NaN too.
  __device__ static float limited(float above) {
    if (above == INFINITY) return NAN;
    return above > kMostAbove ? kMostAbove : above;
  }

  // The elements of a lane in both of its rows of every row tile, as operands of products.
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
            read_thread() % 4 * 2;
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

  __device__ static void clear(float (&parts)[kRowTiles * kThreadRows]) {
#pragma unroll
    for (float& part : parts) part = 0.0f;
  }

  // The sums of a stage once more, with limited weights. The code runs rarely, so it is not
  // unrolled and leaves the registers to the main path.
  __device__ __forceinline__ void add_limited(const KeyRead& keys,
                                              float (&sums)[kSumsPerStage][kSumRows]) const {
#pragma unroll
    for (int nth = 0; nth < kSumsPerStage; ++nth) {
      float parts[kRowTiles * kThreadRows];
      clear(parts);
#pragma unroll 1
      for (int key = nth * kSumKeys; key < (nth + 1) * kSumKeys; key += 8) {
        float scores[1][kRowTiles][4];
        multiply(keys, key, scores);
        weigh<true>(scores[0], parts);
      }
      share_quad(parts, sums[nth]);
    }
  }

  // Adds the weights of the lane's scores, by row.
  template <bool kIsLimited>
  __device__ __forceinline__ void weigh(const float (&scores)[kRowTiles][4],
                                        float (&parts)[kRowTiles * kThreadRows]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float above = scores[m][i] * args_.factor + offset_[m][row_of(i)];
        parts[m * kThreadRows + row_of(i)] += exp2_approx(kIsLimited ? limited(above) : above);
      }
    }
  }

  // Scores of kMany times 8 keys, starting with row `key` of the stage.
  template <int kMany>
  __device__ __forceinline__ void multiply(const KeyRead& keys, int key,
                                           float (&scores)[kMany][kRowTiles][4]) const {
#pragma unroll
    for (auto& eight : scores) {
#pragma unroll
      for (float (&four)[4] : eight) {
#pragma unroll
        for (float& score : four) score = 0.0f;
      }
    }
    // Two steps at once: four matrices of 8 keys by 8 columns.
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t words[kMany][4];
#pragma unroll
      for (int i = 0; i < kMany; ++i) load_matrices(keys.at(step, key + 8 * i), words[i]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kMany; ++i) {
          multiply_step(step + half, words[i][2 * half], words[i][2 * half + 1], scores[i]);
        }
      }
    }
  }

  // Adds the products of 16 columns of 8 keys.
  __device__ __forceinline__ void multiply_step(int step, uint32_t b0, uint32_t b1,
                                                float (&scores)[kRowTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const uint32_t (&a)[4] = queries_[m][step];
      multiply_16x8x16<Element>(scores[m], a[0], a[1], a[2], a[3], b0, b1);
    }
  }

  // Appends the sums of a quad and drops the oldest ones. If sums are computed in a loop, the
  // compiler does not know their index, which would put the array into local memory.
  __device__ __forceinline__ void push(const float (&parts)[kRowTiles * kThreadRows],
                                       float (&sums)[kSumsPerStage][kSumRows]) const {
#pragma unroll
    for (int nth = 1; nth < kSumsPerStage; ++nth) {
#pragma unroll
      for (int i = 0; i < kSumRows; ++i) sums[nth - 1][i] = sums[nth][i];
    }
    share_quad(parts, sums[kSumsPerStage - 1]);
  }

  // Sums over the lanes of a quad. Each lane gets its own rows.
  __device__ __forceinline__ void share_quad(const float (&parts)[kRowTiles * kThreadRows],
                                             float (&sums)[kSumRows]) const {
    const int lane = read_thread();
    const bool is_odd = lane & 1;
    const bool is_upper = lane & 2;
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

  // Each lane keeps one of two values, and its neighbour keeps the other. Returns the sum of the
  // two lanes' values.
  __device__ __forceinline__ static float exchanged(float first, float second, bool keeps_second,
                                                    int mask) {
    const float received = __shfl_xor_sync(~0u, keeps_second ? first : second, mask);
    return (keeps_second ? second : first) + received;
  }

  const SampledArgs& args_;
  uint32_t queries_[kRowTiles][kSteps][4];
  float offset_[kRowTiles][kThreadRows];
  int candidate_end_[kSumRows];
  float total_[kSumRows];
};

}  // namespace pbs::cuda::sm80
