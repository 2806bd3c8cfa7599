// From the sums of a stack to rows of the block mask, by single warps.
#pragma once

#include "../select_blocks/mask_row.cuh"
#include "sums.cuh"

namespace pbs::cuda {

// Sums of one query block's samples.
struct BlockSums {
  const char* table;     // from the first row of the block on
  const float* weights;  // of its rows
  int num_rows;

  // The largest share that a sample gives to each key block of a tile. So many loads are in flight
  // that few tiles in work at once are enough.
  __device__ void shares(int entry, int sums_per_block, float (&found)[kSumsPerTile]) const {
    constexpr int kRowsPerLoad = 2;
    constexpr int kLoads = 4;
    const char* rows = table + static_cast<int64_t>(entry) * kStackRows * kSumsPerTile * 2;
#pragma unroll
    for (float& share : found) share = 0.0f;
    if (num_rows == 1)
      return add_row(*reinterpret_cast<const uint2*>(rows), 0, sums_per_block, found);
#pragma unroll 2
    for (int first = 0; first < num_rows; first += kLoads * kRowsPerLoad) {
      uint4 pairs[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = min(first + i * kRowsPerLoad, num_rows - kRowsPerLoad);  // maybe once more
        pairs[i] = *reinterpret_cast<const uint4*>(rows + row * kSumsPerTile * 2);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = min(first + i * kRowsPerLoad, num_rows - kRowsPerLoad);
        add_row(uint2{pairs[i].x, pairs[i].y}, row, sums_per_block, found);
        add_row(uint2{pairs[i].z, pairs[i].w}, row + 1, sums_per_block, found);
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
        const BlockSums sums{
            table_of(args_, walk.table(), warpgroup) + first_row * kSumsPerTile * 2,
            shared_.weights[walk.table()][warpgroup] + first_row, args_.plan.rows_per_pair};
        write_pair(unit, stack, unit.pair(stack.first_pair + i % pairs_per_stack), sums, sink);
      }
      shared_.table_empty[walk.table()].arrive();
    }
  }

 private:
  __device__ void write_pair(const SampledUnit& unit, const SampledStack& stack,
                             const SampledPair& pair, const BlockSums& sums, int sink) {
    const QueryBlock block = describe(args_, pair.block_idx);
    const auto num_candidates = static_cast<int>(block.num_candidates);
    const float of_candidates = write_masses(sums, num_candidates);
    const float own = args_.params.is_by_block ? 0.0f : own_mass(unit, stack, sums);
    const int64_t row = (unit.b * args_.params.problem.num_q_heads + pair.hq) *
                            static_cast<int64_t>(args_.num_q_blocks) +
                        pair.block_idx;
    write_row(args_.params, args_.num_words, row, num_candidates, sink, masses_,
              cut(sums, num_candidates, of_candidates, own));
    __syncwarp();  // the next row overwrites the masses
  }

  // Masses of the candidates, and zeros to a multiple of four. Returns their sum.
  __device__ float write_masses(const BlockSums& sums, int num_candidates) const {
    const int blocks_per_tile = kSumsPerTile / sums_per_block_;
    const int num_tiles = (num_candidates + blocks_per_tile - 1) / blocks_per_tile;
    float total = 0.0f;
    for (int tile = lane_; tile < num_tiles; tile += 32) {
      float shares[kSumsPerTile];
      sums.shares(args_.plan.own_tiles + tile, sums_per_block_, shares);
#pragma unroll
      for (int i = 0; i < kSumsPerTile; ++i) {
        const int block = tile * blocks_per_tile + i;
        if (i >= blocks_per_tile || block >= num_candidates) continue;
        // Rounding may have made more than 1 of it.
        const float mass = fminf(shares[i], 1.0f);
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
                            const BlockSums& sums) const {
    const TileRange tiles(stack.own, unit.own.begin);
    const int blocks_per_tile = kSumsPerTile / sums_per_block_;
    float total = 0.0f;
    for (int tile = tiles.first + lane_; tile < tiles.end; tile += 32) {
      float shares[kSumsPerTile];
      sums.shares(tile, sums_per_block_, shares);
#pragma unroll
      for (int i = 0; i < kSumsPerTile; ++i) {
        if (i < blocks_per_tile) total += shares[i];
      }
    }
    return warp_sum(total);
  }

  __device__ Cut cut(const BlockSums& sums, int num_candidates, float of_candidates,
                     float own) const {
    // With a NaN among the inputs no order means anything: visit everything, as dense would.
    bool is_ordered = true;
    for (int row = lane_; row < sums.num_rows; row += 32) is_ordered &= sums.weights[row] >= 0.0f;
    is_ordered = __all_sync(~0u, is_ordered);
    const auto threshold = static_cast<float>(args_.params.threshold);
    if (is_ordered && args_.params.is_by_block) {
      return Cut{__float_as_uint(threshold), num_candidates, true};
    }
    const float total = of_candidates + own;
    if (args_.params.threshold >= 1.0 || !is_ordered || !(total > 0.0f)) {
      return Cut{0, num_candidates, true};
    }
    const float needed = threshold * total - own;
    return find_cut(masses_, num_candidates, of_candidates, needed, shared_.scratch[warp_]);
  }

  const SampledArgs& args_;
  Shared& shared_;
  int warp_;
  int lane_;
  int sums_per_block_;
  float* masses_;
};

}  // namespace pbs::cuda
