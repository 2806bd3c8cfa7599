// Sums of the weights that the sampled queries of one stack give to keys, 32 keys each, from the
// accumulators of a warpgroup. Stacked queries are the rows of a product, a tile of permuted keys
// is its columns.
#pragma once

#include "common/exp2.cuh"
#include "common/select_blocks/sampled/pair_mask.cuh"
#include "unit_walk.cuh"
#include "weights.cuh"

namespace pbs::cuda::sm90 {

// A weight is limited to this factor times the weights of the own segment, so that all sums are
// finite.
constexpr float kMostAbove = 80.0f;  // powers of two
// The range of half precision above the weights of the own segment, or above the current offset of
// a row.
constexpr float kPackedAbove = 16.0f - kOwnExponent;

// The sums of a lane for a tile: for both of its rows, over the 32 keys of its place in the quad.
using LaneSums = float[kThreadRows];
static_assert(kSumsPerTile == 4, "a lane of a quad has one");

// Each lane keeps one of two values, and its neighbour keeps the other. Returns the sum of the two
// lanes' values.
__device__ __forceinline__ __half2 exchanged_sum(__half2 first, __half2 second, bool keeps_second,
                                                 int mask) {
  const uint32_t low = half_bits_of(first), high = half_bits_of(second);
  const uint32_t received = __shfl_xor_sync(~0u, keeps_second ? low : high, mask);
  return __hadd2(half_pair_of(keeps_second ? high : low), half_pair_of(received));
}

// Sums over the lanes of a quad for 32 keys, in pairs of columns. Each lane gets the sums of both
// rows over its own keys. NOTE: a product with ones takes fewer instructions, but waits for all
// other products.
__device__ __forceinline__ __half2 share_quad(const __half2 (&parts)[kSumsPerTile][kThreadRows]) {
  const bool is_second_half = threadIdx.x & 2;
  __half2 rows[kSumsPerTile];
#pragma unroll
  for (int i = 0; i < kSumsPerTile; ++i) {
    rows[i] =
        __hadd2(__lows2half2(parts[i][0], parts[i][1]), __highs2half2(parts[i][0], parts[i][1]));
  }
  return exchanged_sum(exchanged_sum(rows[0], rows[2], is_second_half, 2),
                       exchanged_sum(rows[1], rows[3], is_second_half, 2), threadIdx.x & 1, 1);
}

template <class Traits>
class StackSums {
 public:
  using Scores = decltype(cute::partition_fragment_C(
      typename Traits::Mma{},
      cute::Shape<typename Traits::Layouts::Rows, typename Traits::Layouts::Columns>{}));

  __device__ void start(const SampledRow* rows, char* table) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const SampledRow row = rows[first_row() + 8 * r];
      factor_[r] = row.factor;
      offset_[r] = __float2half2_rn(row.offset);
      unit_[r] = -1.0f / kOwnWeight;
      candidate_end_[r] = row.candidate_end;
      own_sum_[r] = row.own_sum;
      total_[r] = 0.0f;
    }
    const int lane = static_cast<int>(threadIdx.x);
    place_ = table + (first_row() + lane % 2 * 8) * kSumsPerRead * 2 + lane / 2 % 2 * kSumsPerTile;
  }

  // With kHides, rows may see only a part of the tile, or none of it.
  template <bool kHides>
  __device__ __forceinline__ void add(Scores& scores, int tile, float scale) {
    if (kHides) hide(scores, tile * kSampledKeys);
    const float factor[kThreadRows] = {factor_[0] * scale, factor_[1] * scale};
    const float2 packed = __half22float2(weigh(scores, factor));
    LaneSums sums = {packed.x * unit_[0], packed.y * unit_[1]};
    // A weight or a factor was too large for half precision, or is NaN.
    const bool is_exact = packed.x + packed.y > -kMostPacked && factor[0] + factor[1] < kMostFactor;
    if (__any_sync(~0u, !is_exact)) weigh_exactly(scores, factor, sums);
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) total_[r] += sums[r];
    write_sums(sums, tile);
  }

  // The total over all keys so far, by row of the thread.
  __device__ float total(int r) const { return quad_sum(total_[r]); }

  // Writes the factor for the weights of a row, as two equal bfloat16.
  __device__ void write_weight(uint32_t* weights, int r, float total) const {
    total += own_sum_[r];
    // A row that does not exist has factor 0. In a row that sees nothing, all shares are 0.
    const float weight = candidate_end_[r] >= 0 && total != 0.0f ? 1.0f / total : 0.0f;
    if (threadIdx.x % 4 == 0) {
      weights[first_row() + 8 * r] = bits_of(__float2bfloat162_rn(weight));
    }
  }

  __device__ static int first_row() { return row_of_thread(static_cast<int>(threadIdx.x) % 128); }

 private:
  // A lane passes one of its sums to its neighbour, and writes two adjacent sums of one row.
  __device__ __forceinline__ void write_sums(const LaneSums& sums, int tile) const {
    constexpr int kTileBytes = kSumsPerTile * 2;  // in one read of a row
    constexpr int kReadBytes = kStackRows * kSumsPerRead * 2;
    const uint32_t own = bits_of(__floats2bfloat162_rn(sums[0], sums[1]));
    const uint32_t other = __shfl_xor_sync(~0u, own, 1);
    const uint32_t both =
        threadIdx.x % 2 != 0 ? __byte_perm(other, own, 0x7632) : __byte_perm(own, other, 0x5410);
    char* place = place_ + static_cast<int64_t>(tile / kTilesPerRead) * kReadBytes +
                  tile % kTilesPerRead * kTileBytes;
    *reinterpret_cast<uint32_t*>(place) = both;
  }

  // NOTE: access to single elements of accumulators makes ptxas wait for every product.
  __device__ __forceinline__ void hide(Scores& scores, int begin) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    cute::Tensor pairs = cute::recast<uint32_t>(scores);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(pairs); ++i) {
      // The two keys of a pair belong to one block.
      const bool is_hidden = begin + column_of(2 * i, lane) >= candidate_end_[i % kThreadRows];
      if (is_hidden) pairs(i) = half_bits_of(__float2half2_rn(-INFINITY));
    }
  }

  // The sums of the lane, in half precision and multiples of unit_.
  __device__ __forceinline__ __half2 weigh(const Scores& scores,
                                           const float (&factor)[kThreadRows]) const {
    const cute::Tensor pairs = cute::recast<uint32_t>(scores);
    __half2 factors[kThreadRows];
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      factors[r] = __float2half2_rn(factor[r] * (1.0f / kWeightRange));
    }
    __half2 parts[kSumsPerTile][kThreadRows];
    CUTE_UNROLL
    for (int i = 0; i < cute::size(pairs); ++i) {
      const int r = i % kThreadRows;
      __half2& part = parts[i / kPairsPerSum][r];
      const __half2 weights = minus_weights(half_pair_of(pairs(i)), factors[r], offset_[r]);
      part = i % kPairsPerSum < kThreadRows ? weights : __hadd2(part, weights);
    }
    return share_quad(parts);
  }

  // A hidden key has weight 0, whatever the factor of its tile. NaN is kept.
  __device__ static float exact_weight(float score, float factor, float shift, float most) {
    if (score == -INFINITY) return 0.0f;
    const float above = __fmaf_rn(score, factor, shift);
    return exp2_approx(above > most ? most : above);
  }

  // The sums in single precision, without the range of half precision. Rows with large weights in
  // this tile raise their offset, so that the next tiles fit.
  __device__ void weigh_exactly(const Scores& scores, const float (&factor)[kThreadRows],
                                LaneSums& sums) {
    const cute::Tensor pairs = cute::recast<uint32_t>(scores);
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const float offset = __low2float(offset_[r]);
      const float shift = (offset - kWeightOffset) * kWeightRange;
      const float unit = -unit_[r] * kOwnWeight;
      const float most = kMostAbove - log2f(unit);
      float row_sum = 0.0f;
      CUTE_UNROLL
      for (int nth = 0; nth < kSumsPerTile; ++nth) {
        float part = 0.0f;
        CUTE_UNROLL
        for (int i = 0; i < kPairsPerSum; i += kThreadRows) {
          const float2 pair = __half22float2(half_pair_of(pairs(nth * kPairsPerSum + i + r)));
          part += exact_weight(pair.x, factor[r], shift, most);
          part += exact_weight(pair.y, factor[r], shift, most);
        }
        part = quad_sum(part);
        row_sum += part;
        if (static_cast<int>(threadIdx.x) % 4 == nth) sums[r] = part * unit;
      }
      // The offset moves at most to where the largest half-precision number is below the limit.
      const float moved = fminf(log2f(row_sum), most - kPackedAbove);
      if (row_sum > kOwnWeight && moved > 0.0f) {
        offset_[r] = __float2half2_rn(offset - moved * (1.0f / kWeightRange));
        unit_[r] *= exp2_approx((offset - __low2float(offset_[r])) * kWeightRange);
      }
    }
  }

  static constexpr int kPairsPerSum = kThreadRows * kSumKeys / 8;
  // Upper bounds of the sum of two finite sums, and of the sum of two finite factors.
  static constexpr float kMostPacked = 2 * 65536.0f;
  static constexpr float kMostFactor = 60000.0f * kWeightRange;

  float factor_[kThreadRows];
  __half2 offset_[kThreadRows];
  float unit_[kThreadRows];  // unit of the sums in half precision; changes with offset_
  int candidate_end_[kThreadRows];
  float own_sum_[kThreadRows];
  float total_[kThreadRows];
  char* place_;  // address of the lane in the first tile of the table
};

}  // namespace pbs::cuda::sm90
