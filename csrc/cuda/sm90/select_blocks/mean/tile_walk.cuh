// The tiles that the CTAs of select_blocks work on, their order, and the shared memory of a CTA.
//
// A CTA works on one tile after the other, each of query blocks of one head. A warpgroup loads and
// averages the queries, one tile ahead of the warps that compute and cut the rows of logits.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include "common/select_blocks/mean/mean_args.cuh"
#include "logits.cuh"
#include "pbs/sm90/select_tiles.h"
#include "sm90/warpgroup.cuh"

namespace pbs::cuda::sm90 {

constexpr int kSelectThreads = 32 * (kRowWarps + kMeanWarps);

struct SelectArgs : MeanArgs {
  SelectTiles tiles;
  CUtensorMap q;  // unused for float32
};

struct SelectBarriers {
  cutlass::arch::ClusterTransactionBarrier slot_full[kMaxQuerySlots];
  cutlass::arch::ClusterBarrier slot_empty[kMaxQuerySlots];
  // Every thread arrives itself: racecheck does not see that __syncwarp orders a whole warp before
  // the one lane that would arrive.
  cutlass::arch::ClusterBarrier means_full[kMeanBuffers];
  cutlass::arch::ClusterBarrier means_empty[kMeanBuffers];
  int sinks[kMeanBuffers];  // with the same buffers as the means
};
static_assert(sizeof(SelectBarriers) <= kSelectBarrierBytes);

template <int kHeadDim>
struct SelectShared {
  static constexpr int kMeansFloats = query_means_floats(kHeadDim);

  __device__ SelectShared(const SelectArgs& args, char* raw)
      : slot_bytes(query_slot_bytes(kHeadDim, static_cast<int>(args.params.blocking.block_size))) {
    slots = first_swizzled(raw);
    means = reinterpret_cast<uint32_t*>(slots + args.tiles.num_slots * slot_bytes);
    logits = reinterpret_cast<float*>(means + 2 * kMeanBuffers * kMeansFloats);
    scratch = reinterpret_cast<uint32_t*>(logits + args.tiles.rows * args.row_stride);
    ones = scratch + kRowWarps * kCutScratch;
    barriers = reinterpret_cast<SelectBarriers*>(static_cast<char*>(ones) + kOnesBytes);
  }

  __device__ SplitQueries means_of(int buffer) const {
    uint32_t* high = means + 2 * buffer * kMeansFloats;
    return SplitQueries{high, high + kMeansFloats};
  }

  int slot_bytes;
  char* slots;
  uint32_t* means;    // (kMeanBuffers, 2, kHeadDim / 4, kLogitRows, 4)
  float* logits;      // (tile_rows, row_stride)
  uint32_t* scratch;  // (kRowWarps, kCutScratch)
  void* ones;         // the matrix of ones that sums the queries
  SelectBarriers* barriers;
};

// The tiles of a CTA. Tiles are ordered from the longest rows to the shortest, across heads, and
// taken from both ends in turn: the data of a short tile is loaded while the CTA works on a long
// one.
class TileWalk {
 public:
  __device__ explicit TileWalk(const SelectArgs& args) : args_(args) {
    const Problem& problem = args.params.problem;
    num_heads_ = static_cast<int>(problem.batch * problem.num_q_heads);
    tiles_per_head_ = (args.num_q_blocks + args.tiles.rows - 1) / args.tiles.rows;
  }

  __device__ bool is_done() const {
    return nth_ * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x) >=
           num_heads_ * tiles_per_head_;
  }
  __device__ void advance() { ++nth_; }
  __device__ int nth() const { return nth_; }

  __device__ SelectTile tile() const {
    const auto num_q_heads = static_cast<int>(args_.params.problem.num_q_heads);
    const int from_end = nth_ / 2 * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    const int idx = nth_ % 2 == 0 ? from_end : num_heads_ * tiles_per_head_ - 1 - from_end;
    const int head = idx % num_heads_;
    SelectTile tile{};
    tile.b = head / num_q_heads;
    tile.hq = head % num_q_heads;
    tile.first_block = (tiles_per_head_ - 1 - idx / num_heads_) * args_.tiles.rows;
    tile.num_blocks = min(args_.tiles.rows, args_.num_q_blocks - tile.first_block);
    return tile;
  }

 private:
  const SelectArgs& args_;
  int num_heads_;
  int tiles_per_head_;
  int nth_ = 0;
};

}  // namespace pbs::cuda::sm90
