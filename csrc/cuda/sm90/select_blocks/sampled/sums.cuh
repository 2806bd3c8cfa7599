// Sums of the weights that sampled queries give to keys, 32 keys each, by the warpgroups that
// multiply. Stacked queries are the rows of a product, a tile of summarised keys its columns.
#pragma once

#include <cuda_bf16.h>

#include <cfloat>

#include "common/exp2.cuh"
#include "unit_walk.cuh"

namespace pbs::cuda::sm90 {

// A thread's sums of a tile, by 32 keys, and row.
using TileSums = float[kSumsPerTile][kThreadRows];

// Weights are exp2(score - shift), where shift is the logarithm of the weights of the own segment.
// A score further above it than this counts as if it were there, so that all sums are finite.
constexpr float kMostAbove = 80.0f;
constexpr float kMostWeight = 1.2089258e24f;  // exp2 of it

using BFloat16Pair = __nv_bfloat162;

__device__ inline uint32_t bits_of(BFloat16Pair pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline BFloat16Pair pair_of(uint32_t bits) {
  return reinterpret_cast<const BFloat16Pair&>(bits);
}
__device__ inline BFloat16Pair shuffled(BFloat16Pair pair, int mask) {
  return pair_of(__shfl_xor_sync(~0u, bits_of(pair), mask));
}

// The sums of a quad's lanes, added up. Each lane gets four of the sixteen: of row lane % 2, and of
// the first or the second half of the tile, as lane / 2 % 2 says; the arguments say which. Two at a
// time, in bfloat16: they are kept like that anyhow.
__device__ __forceinline__ uint2 share_quad(const TileSums& sums, bool is_second_half,
                                            bool is_second_row) {
  constexpr int kHalf = kSumsPerTile / 2;
  BFloat16Pair both_rows[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const BFloat16Pair first = __floats2bfloat162_rn(sums[i][0], sums[i][1]);
    const BFloat16Pair second = __floats2bfloat162_rn(sums[kHalf + i][0], sums[kHalf + i][1]);
    both_rows[i] =
        __hadd2(is_second_half ? second : first, shuffled(is_second_half ? first : second, 2));
  }
  uint32_t found[kHalf / 2];
#pragma unroll
  for (int i = 0; i < kHalf / 2; ++i) {
    const BFloat16Pair first = __lows2bfloat162(both_rows[2 * i], both_rows[2 * i + 1]);
    const BFloat16Pair second = __highs2bfloat162(both_rows[2 * i], both_rows[2 * i + 1]);
    found[i] = bits_of(
        __hadd2(is_second_row ? second : first, shuffled(is_second_row ? first : second, 1)));
  }
  return uint2{found[0], found[1]};
}

// exp2 without the unit that all others wait for: the exponent and a straight line between powers
// of two, within 3 %. `scaled` is (log2 of it + kLinearOffset) / kLinearRange; below 0 it gives 0,
// from 1 on infinity.
constexpr float kLinearRange = 255.0f;
constexpr float kLinearOffset = 127.0f - 0.043f;

__device__ __forceinline__ float exp2_linear(float scaled) {
  const uint32_t one = 0x3f800000u;
  const uint32_t mantissa_above_one = __float_as_uint(__saturatef(scaled) + 1.0f);
  return __uint_as_float(mantissa_above_one * 255u - one * 255u);
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
        is_second_row_(lane_ & 1) {}

  __device__ void run() {
    DrawnUnits<Traits> walk(args_, shared_);
    while (walk.next()) {
      const SampledUnit unit = walk.unit();
      const SampledStack stack = unit.stack(warpgroup_);
      place_ = table_of(args_, walk.table(), warpgroup_) +
               (row_ + lane_ % 2 * 8) * kSumsPerTile * 2 + lane_ / 2 % 2 * kSumsPerTile;
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
      shift_[r] = row.shift;
      candidate_end_[r] = row.candidate_end;
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
    const int num_seen = uniform((stack.candidate_end + kSummaryKeys - 1) / kSummaryKeys);
    const int num_whole = min(num_seen, uniform(stack.end_of_whole / kSummaryKeys));
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
        *reinterpret_cast<const float*>(shared_.k[ring_.stage()] + kTileColumns * Traits::kHeadDim);
    multiply(scores);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    release(shared_.k_empty[ring_.stage()]);
    ring_.advance();
    if (kHides) hide(scores, tile * kSummaryKeys);
    float factor[kThreadRows] = {factor_[0] * scale, factor_[1] * scale};
    if (kHides) {
      // NOTE: it is 0 for a row or a tile of zeros, and 0 times -infinity would be NaN. A NaN
      // stays.
      CUTE_UNROLL
      for (float& each : factor) each = each < FLT_MIN ? FLT_MIN : each;
    }
    TileSums sums;
    float total[kThreadRows];
    weigh<false>(scores, factor, sums, total);
    if (__any_sync(~0u, !(fmaxf(total[0], total[1]) < kMostWeight))) {
      weigh<true>(scores, factor, sums, total);
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) total_[r] += total[r];
    *reinterpret_cast<uint2*>(place_) = share_quad(sums, is_second_half_, is_second_row_);
    place_ += kStackRows * kSumsPerTile * 2;
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
      const int key = begin + first_key_of(column_of(i, lane_));
      if (key >= candidate_end_[row_of(i)]) scores(i) = -INFINITY;
    }
  }

  template <bool kIsCut>
  __device__ __forceinline__ void weigh(const Scores& scores, const float (&factor)[kThreadRows],
                                        TileSums& sums, float (&total)[kThreadRows]) const {
    constexpr int kExactElements = kExactKeys / 2;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(Scores{}); ++i) {
      const int r = row_of(i);
      const bool is_exact = i < kExactElements;
      const int sum = is_exact ? 0 : 1 + (i - kExactElements) / 4;
      const bool is_first = i % 2 == 0 && (is_exact ? i < 4 : true);
      float weight;
      if (!kIsCut && sum >= kSumsPerTile - kLinearSums) {
        weight =
            exp2_linear(__fmaf_rn(scores(i), factor[r] * (1.0f / kLinearRange),
                                  (kLinearOffset + kLog2Pool - shift_[r]) * (1.0f / kLinearRange)));
      } else {
        float above =
            __fmaf_rn(scores(i), factor[r], is_exact ? -shift_[r] : kLog2Pool - shift_[r]);
        if (kIsCut) above = above > kMostAbove ? kMostAbove : above;  // a NaN stays one
        weight = exp2_approx(above);
      }
      sums[sum][r] = is_first ? weight : sums[sum][r] + weight;
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      total[r] = ((sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r])) +
                 ((sums[4][r] + sums[5][r]) + (sums[6][r] + sums[7][r]));
    }
  }

  __device__ void write_weights(int table) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const float total = args_.total_of_own + quad_sum(total_[r]);
      // A row that does not exist weighs nothing; in one that sees nothing all shares are 0.
      const bool exists = shift_[r] != INFINITY && total != 0.0f;
      if (lane_ % 4 == 0) {
        shared_.weights[table][warpgroup_][row_ + 8 * r] =
            bits_of(__float2bfloat162_rn(exists ? 1.0f / total : 0.0f));
      }
    }
  }

  // Sums of a tile that come from exp2_linear: as many as balance the units.
  static constexpr int kLinearSums = 3;
  static constexpr float kLog2Pool = 2.0f;
  static_assert(kPoolSize == 4);

  const SampledArgs& args_;
  Shared& shared_;
  int lane_;
  int warpgroup_;
  int row_;
  bool is_second_half_;
  bool is_second_row_;
  char* place_ = nullptr;  // of the lane, in the table's next tile
  float factor_[kThreadRows];
  float shift_[kThreadRows];
  float total_[kThreadRows];
  int candidate_end_[kThreadRows];
  RingState<Traits::kStages> ring_;
};

}  // namespace pbs::cuda::sm90
