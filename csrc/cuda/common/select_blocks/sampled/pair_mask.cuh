// Turns the sums of a pair's samples into its row of the block mask, in single warps.
#pragma once

#include <cuda_bf16.h>

#include "common/select_blocks/find_sink.cuh"
#include "units.cuh"

namespace pbs::cuda {

using BFloat16Pair = __nv_bfloat162;

__device__ inline uint32_t bits_of(BFloat16Pair pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline BFloat16Pair pair_of(uint32_t bits) {
  return reinterpret_cast<const BFloat16Pair&>(bits);
}

// Sums of one pair's samples.
struct PairSums {
  const char* table;        // starts at the first row of the pair
  const uint32_t* weights;  // one weight per row
  int num_rows;
};

// The largest share of a sample in each block of the tiles that a lane reads at once.
template <int kSumsPerBlock>
struct ReadShares {
  static constexpr int kBlocks = kSumsPerRead / kSumsPerBlock;
  static constexpr int kPairs = kSumsPerBlock == 1 ? kBlocks / 2 : kBlocks;

  BFloat16Pair largest[kPairs];

  __device__ ReadShares() {
#pragma unroll
    for (BFloat16Pair& pair : largest) pair = pair_of(0);
  }

  __device__ float of_block(int i) const {
    if (kSumsPerBlock > 1) return __low2float(largest[i]);
    return i % 2 == 0 ? __low2float(largest[i / 2]) : __high2float(largest[i / 2]);
  }

  __device__ void add(const PairSums& sums, int read) {
    constexpr int kAtOnce = 8;  // loads in flight
    const auto* rows = reinterpret_cast<const uint4*>(
        sums.table + static_cast<int64_t>(read) * kStackRows * kSumsPerRead * 2);
#pragma unroll 1
    for (int first = 0; first < sums.num_rows; first += kAtOnce) {
      uint4 row[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) row[i] = rows[min(first + i, sums.num_rows - 1)];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        add_row(row[i], pair_of(sums.weights[min(first + i, sums.num_rows - 1)]));
      }
    }
  }

 private:
  __device__ void add_row(const uint4& row, BFloat16Pair weight) {
    BFloat16Pair shares[] = {__hmul2(pair_of(row.x), weight), __hmul2(pair_of(row.y), weight),
                             __hmul2(pair_of(row.z), weight), __hmul2(pair_of(row.w), weight)};
    if (kSumsPerBlock > 1) {
#pragma unroll
      for (BFloat16Pair& share : shares) share = __hadd2(share, __lowhigh2highlow(share));
    }
    if (kSumsPerBlock > 2) {
      shares[0] = __hadd2(shares[0], shares[1]);
      shares[1] = __hadd2(shares[2], shares[3]);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) largest[i] = __hmax2(largest[i], shares[i]);
  }
};

// Writes rows of the block mask.
class PairMask {
 public:
  __device__ explicit PairMask(const SampledArgs& args)
      : args_(args), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void write(const SampledUnit& unit, const SampledPair& pair, const PairSums& sums,
                        int sink) const {
    switch (args_.params.blocking.kv_block_size / kSumKeys) {
      case 1:
        return write_pair<1>(unit, pair, sums, sink);
      case 2:
        return write_pair<2>(unit, pair, sums, sink);
      case 4:
        return write_pair<4>(unit, pair, sums, sink);
    }
  }

 private:
  // Sets and counts the bits of the blocks that reach the threshold or are always visited.
  template <int kSumsPerBlock>
  __device__ void write_pair(const SampledUnit& unit, const SampledPair& pair, const PairSums& sums,
                             int sink) const {
    constexpr int kBlocksPerRead = kSumsPerRead / kSumsPerBlock;
    const Problem& problem = args_.params.problem;
    const SelectRule& rule = args_.params.rule;
    const QueryBlock block = block_of(args_, pair.block_idx);
    const auto num_candidates = static_cast<int>(block.num_candidates);
    const int num_scored = num_scored_blocks(args_, block);
    const bool takes_all = rule.threshold >= 1.0 || (num_scored > 0 && !is_ordered(sums));
    const float least = takes_all ? 0.0f : static_cast<float>(rule.threshold);
    const auto num_heads = static_cast<int>(heads_per_selection(problem, rule));
    const int64_t first_row =
        (unit.b * problem.num_q_heads + pair.hq) * static_cast<int64_t>(args_.num_q_blocks) +
        pair.block_idx;
    // A lane reads the sums of the blocks in one byte of the mask.
    const int num_bytes = 4 * args_.num_words;
    int count = 0;
    for (int first = 0; first < num_bytes * kSumsPerBlock; first += 32) {
      const int read = first + lane_;
      ReadShares<kSumsPerBlock> shares;
      if (read * kBlocksPerRead < num_scored) shares.add(sums, read);
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kBlocksPerRead; ++i) {
        const int candidate = read * kBlocksPerRead + i;
        const bool is_visited =
            candidate >= num_scored || candidate == sink || !(shares.of_block(i) < least);
        if (candidate < num_candidates) bits |= static_cast<uint32_t>(is_visited) << i;
      }
      count += __popc(bits);
#pragma unroll
      for (int step = 1; step < kSumsPerBlock; step *= 2) {
        bits |= __shfl_down_sync(~0u, bits, step) << step * kBlocksPerRead;
      }
      const int byte = read / kSumsPerBlock;
      if (read % kSumsPerBlock != 0 || byte >= num_bytes) continue;
      for (int head = 0; head < num_heads; ++head) {
        const int64_t row = first_row + head * static_cast<int64_t>(args_.num_q_blocks);
        reinterpret_cast<uint8_t*>(args_.params.block_mask + row * args_.num_words)[byte] =
            static_cast<uint8_t>(bits);
      }
    }
    count = __reduce_add_sync(~0u, count);
    for (int head = lane_; head < num_heads; head += 32) {
      args_.params.counts[first_row + head * static_cast<int64_t>(args_.num_q_blocks)] = count;
    }
  }

  // With NaN among the inputs no order is meaningful: visit everything, as dense attention would.
  __device__ bool is_ordered(const PairSums& sums) const {
    bool is_ordered = true;
    for (int row = lane_; row < sums.num_rows; row += 32) {
      is_ordered &= __low2float(pair_of(sums.weights[row])) >= 0.0f;
    }
    return __all_sync(~0u, is_ordered);
  }

  const SampledArgs& args_;
  int lane_;
};

}  // namespace pbs::cuda
