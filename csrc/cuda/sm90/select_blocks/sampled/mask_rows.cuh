// From the sums of a stack to rows of the block mask, by single warps.
#pragma once

#include "../mean/mask_row.cuh"
#include "sums.cuh"

namespace pbs::cuda::sm90 {

// Sums of one pair's samples.
struct PairSums {
  const char* table;     // from the first row of the pair on
  const float* weights;  // of its rows
  int num_rows;

  // The largest share that a sample gives to each key block of some tiles. So many loads are in
  // flight that few tiles in work at once are enough.
  template <int kTiles>
  __device__ void shares(const int (&entries)[kTiles], int sums_per_block,
                         float (&found)[kTiles][kSumsPerTile]) const {
    constexpr int kRowsPerLoad = 2;
    constexpr int kLoads = 4;
    constexpr int kUnrolled = kTiles == 1 ? 2 : 1;
    const char* rows[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      rows[t] = table + static_cast<int64_t>(entries[t]) * kStackRows * kSumsPerTile * 2;
#pragma unroll
      for (float& share : found[t]) share = 0.0f;
    }
    if (num_rows == 1) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        add_row(*reinterpret_cast<const uint2*>(rows[t]), 0, sums_per_block, found[t]);
      }
      return;
    }
#pragma unroll kUnrolled
    for (int first = 0; first < num_rows; first += kLoads * kRowsPerLoad) {
      uint4 pairs[kTiles][kLoads];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int row = min(first + i * kRowsPerLoad, num_rows - kRowsPerLoad);  // maybe again
          pairs[t][i] = *reinterpret_cast<const uint4*>(rows[t] + row * kSumsPerTile * 2);
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int row = min(first + i * kRowsPerLoad, num_rows - kRowsPerLoad);
          const uint4& pair = pairs[t][i];
          add_row(uint2{pair.x, pair.y}, row, sums_per_block, found[t]);
          add_row(uint2{pair.z, pair.w}, row + 1, sums_per_block, found[t]);
        }
      }
    }
  }

 private:
  __device__ void add_row(uint2 sums, int row, int sums_per_block,
                          float (&found)[kSumsPerTile]) const {
    const float weight = weights[row];
    float share[kSumsPerTile] = {low_bfloat16(sums.x) * weight, high_bfloat16(sums.x) * weight,
                                 low_bfloat16(sums.y) * weight, high_bfloat16(sums.y) * weight};
    if (sums_per_block > 1) {
      share[0] += share[1];
      share[1] = share[2] + share[3];
      if (sums_per_block > 2) share[0] += share[1];
    }
#pragma unroll
    for (int i = 0; i < kSumsPerTile; ++i) found[i] = fmaxf(found[i], share[i]);
  }
};

template <class Traits>
class SampledRowsMask {
 public:
  using Shared = typename Traits::Shared;

  __device__ SampledRowsMask(const SampledArgs& args, Shared& shared, int warp)
      : args_(args),
        shared_(shared),
        warp_(warp),
        lane_(static_cast<int>(threadIdx.x) % 32),
        sums_per_block_(static_cast<int>(args.params.blocking.kv_block_size) / kSumKeys),
        masses_(args.masses +
                (static_cast<int64_t>(blockIdx.x) * kSelectWarps + warp) * args.plan.mass_stride) {}

  __device__ void run() {
    const int pairs_per_stack = args_.plan.pairs_per_stack;
    DrawnUnits<Traits> walk(args_, shared_);
    while (walk.next()) {
      const SampledUnit unit = walk.unit();
      const int sink = find_sink(args_.params, unit.b, unit.hp);
      while (!shared_.table_full[walk.table()].try_wait(walk.parity())) __nanosleep(256);
      for (int i = warp_; i < kSampledWarpgroups * pairs_per_stack; i += kSelectWarps) {
        const int warpgroup = i / pairs_per_stack;
        const SampledStack stack = unit.stack(warpgroup);
        if (i % pairs_per_stack >= stack.num_pairs) continue;
        const int first_row = i % pairs_per_stack * args_.plan.rows_per_pair;
        const PairSums sums{table_of(args_, walk.table(), warpgroup) + first_row * kSumsPerTile * 2,
                            shared_.weights[walk.table()][warpgroup] + first_row,
                            args_.plan.rows_per_pair};
        write_pair(unit, stack, unit.pair(stack.first_pair + i % pairs_per_stack), sums, sink);
      }
      shared_.table_empty[walk.table()].arrive();
    }
  }

 private:
  __device__ void write_pair(const SampledUnit& unit, const SampledStack& stack,
                             const SampledPair& pair, const PairSums& sums, int sink) {
    const QueryBlock block = block_of(args_, pair.block_idx);
    const auto num_candidates = static_cast<int>(block.num_candidates);
    const int64_t row = (unit.b * args_.params.problem.num_q_heads + pair.hq) *
                            static_cast<int64_t>(args_.num_q_blocks) +
                        pair.block_idx;
    if (args_.params.rule.mass == MassRule::kBlock)
      return write_row_by_block(row, num_candidates, sink, sums);
    const float of_candidates = write_masses(sums, num_candidates);
    write_row(args_.params, args_.num_words, row, num_candidates, sink, masses_,
              cut(sums, num_candidates, of_candidates, own_mass(unit, stack, sums)));
    __syncwarp();  // the next row overwrites the masses
  }

  // Sets the bits of the blocks that reach the threshold by themselves, and counts them.
  __device__ void write_row_by_block(int64_t row, int num_candidates, int sink,
                                     const PairSums& sums) const {
    const int blocks_per_tile = kSumsPerTile / sums_per_block_;
    const float least = is_ordered(sums) ? static_cast<float>(args_.params.rule.threshold) : 0.0f;
    uint32_t* words = args_.params.block_mask + row * args_.num_words;
    int count = 0;
    // A lane has two tiles a turn, 32 from each other. 32 tiles are as many words as one of them
    // has blocks.
    constexpr int kTiles = 2;
    const int last_tile = max(num_candidates - 1, 0) / blocks_per_tile;
    for (int first_word = 0; first_word < args_.num_words; first_word += kTiles * blocks_per_tile) {
      int tiles[kTiles];
      int entries[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        tiles[t] = first_word / blocks_per_tile * 32 + 32 * t + lane_;
        entries[t] = args_.plan.own_tiles + min(tiles[t], last_tile);
      }
      float shares[kTiles][kSumsPerTile] = {};
      if (first_word * 32 < num_candidates) sums.shares(entries, sums_per_block_, shares);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kSumsPerTile; ++i) {
          const int block = tiles[t] * blocks_per_tile + i;
          if (i >= blocks_per_tile || block >= num_candidates) continue;
          if (!(shares[t][i] < least) || block == sink) bits |= 1u << (block % 32);
        }
        for (int i = 0; i < blocks_per_tile; ++i) {
          const int word = first_word + t * blocks_per_tile + i;
          const bool is_own = tiles[t] * blocks_per_tile / 32 == word;
          const uint32_t found = __reduce_or_sync(~0u, is_own ? bits : 0);
          if (lane_ == 0 && word < args_.num_words) words[word] = found;
          count += __popc(found);
        }
      }
    }
    if (lane_ == 0) args_.params.counts[row] = count;
  }

  // Masses of the candidates, and zeros to a multiple of four. Returns their sum.
  __device__ float write_masses(const PairSums& sums, int num_candidates) const {
    const int blocks_per_tile = kSumsPerTile / sums_per_block_;
    const int num_tiles = (num_candidates + blocks_per_tile - 1) / blocks_per_tile;
    float total = 0.0f;
    for (int tile = lane_; tile < num_tiles; tile += 32) {
      float shares[1][kSumsPerTile];
      sums.shares({args_.plan.own_tiles + tile}, sums_per_block_, shares);
#pragma unroll
      for (int i = 0; i < kSumsPerTile; ++i) {
        const int block = tile * blocks_per_tile + i;
        if (i >= blocks_per_tile || block >= num_candidates) continue;
        // Rounding may have made more than 1 of it.
        const float mass = fminf(shares[0][i], 1.0f);
        masses_[block] = mass;
        total += mass;
      }
    }
    if (num_candidates + lane_ < (num_candidates + 3) / 4 * 4) {
      masses_[num_candidates + lane_] = 0.0f;
    }
    __syncwarp();
    return warp_sum(total);
  }

  __device__ float own_mass(const SampledUnit& unit, const SampledStack& stack,
                            const PairSums& sums) const {
    const TileRange tiles(stack.own, unit.own.begin);
    const int blocks_per_tile = kSumsPerTile / sums_per_block_;
    float total = 0.0f;
    for (int tile = tiles.first + lane_; tile < tiles.end; tile += 32) {
      float shares[1][kSumsPerTile];
      sums.shares({tile}, sums_per_block_, shares);
#pragma unroll
      for (int i = 0; i < kSumsPerTile; ++i) {
        if (i < blocks_per_tile) total += shares[0][i];
      }
    }
    return warp_sum(total);
  }

  // With a NaN among the inputs no order means anything: visit everything, as dense would.
  __device__ bool is_ordered(const PairSums& sums) const {
    bool is_ordered = true;
    for (int row = lane_; row < sums.num_rows; row += 32) is_ordered &= sums.weights[row] >= 0.0f;
    return __all_sync(~0u, is_ordered);
  }

  __device__ Cut cut(const PairSums& sums, int num_candidates, float of_candidates,
                     float own) const {
    const float total = of_candidates + own;
    if (args_.params.rule.threshold >= 1.0 || !is_ordered(sums) || !(total > 0.0f)) {
      return Cut{0, num_candidates, true};
    }
    const float needed = static_cast<float>(args_.params.rule.threshold) * total - own;
    return find_cut(masses_, num_candidates, of_candidates, needed, shared_.scratch[warp_]);
  }

  const SampledArgs& args_;
  Shared& shared_;
  int warp_;
  int lane_;
  int sums_per_block_;
  float* masses_;
};

}  // namespace pbs::cuda::sm90
