// Sums of the weights that sampled queries give to keys, 32 keys each, by the warpgroups that
// multiply. Stacked queries are the rows of a product, a tile of permuted keys its columns.
#pragma once

#include <cuda_bf16.h>

#include <cfloat>

#include "common/exp2.cuh"
#include "unit_walk.cuh"
#include "weights.cuh"

namespace pbs::cuda::sm90 {

// A lane's sums of a tile: those of its rows and of 32 keys, which its place in the quad says.
using LaneSums = float[kThreadRows];
static_assert(kSumsPerTile == 4, "a lane of a quad has one");

// A weight larger than this times those of the own segment counts as if it were as large, so that
// all sums are finite.
constexpr float kMostAbove = 80.0f;  // powers of two
// Sums of pairs of rows that half precision holds are smaller.
constexpr float kMostPacked = 2 * 65536.0f;

using BFloat16Pair = __nv_bfloat162;

__device__ inline uint32_t bits_of(BFloat16Pair pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline BFloat16Pair pair_of(uint32_t bits) {
  return reinterpret_cast<const BFloat16Pair&>(bits);
}

// Of a lane that keeps the second of two values, or the first, and of its neighbour that keeps the
// other: the sum of both lanes' values.
__device__ __forceinline__ __half2 exchanged_sum(__half2 first, __half2 second, bool keeps_second,
                                                 int mask) {
  const uint32_t low = bits_of(first), high = bits_of(second);
  const uint32_t received = __shfl_xor_sync(~0u, keeps_second ? low : high, mask);
  return __hadd2(half_pair_of(keeps_second ? high : low), half_pair_of(received));
}

// Adds up what the lanes of a quad have of 32 keys, in pairs of columns, and leaves to each lane
// the sums of both rows and the keys that are its own.
__device__ __forceinline__ __half2 share_quad(const __half2 (&sums)[kSumsPerTile][kThreadRows],
                                              bool is_second_half, bool is_odd) {
  __half2 rows[kSumsPerTile];
#pragma unroll
  for (int i = 0; i < kSumsPerTile; ++i) {
    rows[i] = __hadd2(__lows2half2(sums[i][0], sums[i][1]), __highs2half2(sums[i][0], sums[i][1]));
  }
  return exchanged_sum(exchanged_sum(rows[0], rows[2], is_second_half, 2),
                       exchanged_sum(rows[1], rows[3], is_second_half, 2), is_odd, 1);
}

template <class Traits>
class SampledSums {
 public:
  using Shared = typename Traits::Shared;

  __device__ SampledSums(const SampledArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warpgroup_(uniform(static_cast<int>(threadIdx.x) / 128)),
        row_(row_of_thread(static_cast<int>(threadIdx.x) % 128)),
        is_second_half_(lane_ & 2),
        is_odd_(lane_ & 1) {}

  __device__ void run() {
    DrawnUnits<Traits> walk(args_, shared_);
    while (walk.next()) {
      const SampledUnit unit = walk.unit();
      const SampledStack stack = unit.stack(warpgroup_);
      place_ = table_of(args_, walk.table(), warpgroup_) +
               (row_ + lane_ % 2 * 8) * kSumsPerRead * 2 + lane_ / 2 % 2 * kSumsPerTile;
      if (stack.candidate_end > 0) load_stack(unit);
      shared_.table_empty[walk.table()].wait(walk.parity() ^ 1);
      add_tiles(unit, stack);
      if (stack.candidate_end > 0) write_weights(walk.table());
      shared_.table_full[walk.table()].arrive();
    }
  }

 private:
  using Scores = decltype(cute::partition_fragment_C(
      typename Traits::Mma{},
      cute::Shape<typename Traits::Layouts::Rows, typename Traits::Layouts::Columns>{}));

  // The image of the stack, all its loads in flight, and what the thread's rows may see.
  __device__ void load_stack(const SampledUnit& unit) {
    constexpr int kPieces = stack_bytes(Traits::kHeadDim) / 16 / 128;
    const int64_t idx = stack_idx(args_, unit.perm_head, unit.first_stack + warpgroup_);
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const auto* from =
        reinterpret_cast<const uint4*>(args_.stacks + idx * stack_bytes(Traits::kHeadDim));
    uint4 pieces[kPieces];
    CUTE_UNROLL
    for (int i = 0; i < kPieces; ++i) pieces[i] = from[i * 128 + thread];
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const SampledRow row = args_.rows[idx * kStackRows + row_ + 8 * r];
      factor_[r] = row.factor;
      offset_[r] = __float2half2_rn(row.offset);
      unit_[r] = -1.0f / kOwnWeight;
      candidate_end_[r] = row.candidate_end;
      own_sum_[r] = row.own_sum;
      total_[r] = 0.0f;
    }
    auto* to = reinterpret_cast<uint4*>(shared_.q[warpgroup_]);
    // A warp writes rows of the others, which may be behind: at their last product of these rows.
    cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup_);
    CUTE_UNROLL
    for (int i = 0; i < kPieces; ++i) to[i * 128 + thread] = pieces[i];
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup_);
  }

  // All tiles of the unit. Most of them are seen whole by every row, the last ones by fewer stacks.
  __device__ __forceinline__ void add_tiles(const SampledUnit& unit, const SampledStack& stack) {
    const int num_tiles = uniform(unit.num_tiles());
    const int num_seen = uniform((stack.candidate_end + kSampledKeys - 1) / kSampledKeys);
    const int num_whole = min(num_seen, uniform(stack.end_of_whole / kSampledKeys));
    int tile = 0;
    for (; tile < num_whole; ++tile) add_tile<false>(tile);
    for (; tile < num_seen; ++tile) add_tile<true>(tile);
    for (; tile < num_tiles; ++tile) {
      shared_.k_full[ring_.stage()].wait(ring_.parity());
      release(shared_.k_empty[ring_.stage()]);
      ring_.advance();
    }
  }

  template <bool kHides>
  __device__ __forceinline__ void add_tile(int tile) {
    Scores scores = cute::partition_fragment_C(
        typename Traits::Mma{},
        cute::Shape<typename Traits::Layouts::Rows, typename Traits::Layouts::Columns>{});
    shared_.k_full[ring_.stage()].wait(ring_.parity());
    const float scale =
        *reinterpret_cast<const float*>(shared_.k[ring_.stage()] + kSampledKeys * Traits::kHeadDim);
    multiply(scores);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    release(shared_.k_empty[ring_.stage()]);
    ring_.advance();
    if (kHides) hide(scores, tile * kSampledKeys);
    const float factor[kThreadRows] = {factor_[0] * scale, factor_[1] * scale};
    const __half2 packed = weigh(scores, factor);
    LaneSums sums = {__low2float(packed) * unit_[0], __high2float(packed) * unit_[1]};
    // Some weight was too large, or a factor: of what is no number, for example.
    if (__any_sync(~0u, !(__low2float(packed) + __high2float(packed) > -kMostPacked &&
                          factor[0] + factor[1] < kMostFactor))) {
      weigh_exactly(scores, factor, sums);
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) total_[r] += sums[r];
    write_sums(sums, tile);
  }

  // A lane gives one of its sums away, and writes two neighbours of one row.
  __device__ __forceinline__ void write_sums(const LaneSums& sums, int tile) {
    const uint32_t own = bits_of(__floats2bfloat162_rn(sums[0], sums[1]));
    const uint32_t other = __shfl_xor_sync(~0u, own, 1);
    const uint32_t both =
        is_odd_ ? __byte_perm(other, own, 0x7632) : __byte_perm(own, other, 0x5410);
    *reinterpret_cast<uint32_t*>(place_) = both;
    place_ += tile % kTilesPerRead == 0 ? kTileBytes : kStackRows * kSumsPerRead * 2 - kTileBytes;
  }

  // Starts the product with the tile of keys that is there.
  __device__ __forceinline__ void multiply(Scores& scores) {
    typename Traits::Mma mma;
    auto thread = mma.get_thread_slice(0);
    const auto as_narrow = [](char* data) {
      return cute::make_smem_ptr(reinterpret_cast<Narrow*>(data));
    };
    const cute::Tensor q = thread.partition_fragment_A(
        cute::make_tensor(as_narrow(shared_.q[warpgroup_]), typename Traits::Layouts::Stack{}));
    const cute::Tensor k = thread.partition_fragment_B(cute::make_tensor(
        as_narrow(shared_.k[uniform(ring_.stage())]), typename Traits::Layouts::Tile{}));
    start_gemm<true>(mma, q, k, scores);
  }

  __device__ __forceinline__ void hide(Scores& scores, int begin) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      const int key = begin + column_of(i, lane_);
      if (key >= candidate_end_[row_of(i)]) {
        scores(i) = -cutlass::platform::numeric_limits<cutlass::half_t>::infinity();
      }
    }
  }

  // The lane's sums, in half precision and multiples of unit_.
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
    return share_quad(parts, is_second_half_, is_odd_);
  }

  // In single precision, and as large as they are. Rows of which this tile weighs much find room
  // for the next ones.
  __device__ void weigh_exactly(const Scores& scores, const float (&factor)[kThreadRows],
                                LaneSums& sums) {
    constexpr int kElements = cute::size(Scores{}) / kSumsPerTile;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const float unit = -unit_[r] * kOwnWeight;
      const float offset = __low2float(offset_[r]);
      const float most = kMostAbove - log2f(unit);
      // NOTE: 0 times -infinity would be NaN for a row or a tile of zeros. A NaN stays.
      const float positive = factor[r] < FLT_MIN ? FLT_MIN : factor[r];
      float row_sum = 0.0f;
      CUTE_UNROLL
      for (int nth = 0; nth < kSumsPerTile; ++nth) {
        float part = 0.0f;
        CUTE_UNROLL
        for (int i = nth * kElements; i < (nth + 1) * kElements; ++i) {
          if (row_of(i) != r) continue;
          const float above = __fmaf_rn(static_cast<float>(scores(i)), positive,
                                        (offset - kWeightOffset) * kWeightRange);
          part += exp2_approx(above > most ? most : above);
        }
        part = quad_sum(part);
        row_sum += part;
        if (lane_ % 4 == nth) sums[r] = part * unit;
      }
      if (row_sum > kOwnWeight) {
        offset_[r] = __float2half2_rn(offset - log2f(row_sum) * (1.0f / kWeightRange));
        unit_[r] *= exp2_approx((offset - __low2float(offset_[r])) * kWeightRange);
      }
    }
  }

  __device__ void write_weights(int table) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const float total = own_sum_[r] + quad_sum(total_[r]);
      // In a row that sees nothing all shares are 0.
      const bool exists = candidate_end_[r] >= 0 && total != 0.0f;
      if (lane_ % 4 == 0) {
        shared_.weights[table][warpgroup_][row_ + 8 * r] =
            bits_of(__float2bfloat162_rn(exists ? 1.0f / total : 0.0f));
      }
    }
  }

  // Of a row that is read at once, those of one tile.
  static constexpr int kTileBytes = kSumsPerTile * 2;
  static_assert(kTilesPerRead == 2);
  static constexpr int kPairsPerSum = kThreadRows * kSumKeys / 8;
  // Two factors that half precision holds are less together.
  static constexpr float kMostFactor = 60000.0f * kWeightRange;

  const SampledArgs& args_;
  Shared& shared_;
  int lane_;
  int warpgroup_;
  int row_;
  bool is_second_half_;
  bool is_odd_;
  char* place_ = nullptr;  // of the lane, in the table's next tile
  float factor_[kThreadRows];
  __half2 offset_[kThreadRows];
  float unit_[kThreadRows];  // of weights in half precision
  float own_sum_[kThreadRows];
  float total_[kThreadRows];
  int candidate_end_[kThreadRows];
  RingState<Traits::kStages> ring_;
};

}  // namespace pbs::cuda::sm90
