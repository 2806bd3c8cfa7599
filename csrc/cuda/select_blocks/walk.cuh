// What the CTAs of select_blocks work on, in which order, and their shared memory.
//
// A CTA takes one tile of query blocks of one head after the other. A warp loads the queries, other
// warps average them, and the rest find and cut the rows of logits, each a tile ahead of the next.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include "../warpgroup.cuh"
#include "logits.cuh"
#include "pbs/params.h"
#include "pbs/select_tiles.h"

namespace pbs::cuda {

constexpr int kSelectThreads = 32 * (kRowWarps + kMeanWarps + 1);

struct SelectArgs {
  SelectBlocksParams params;
  float* own_means;  // (B, Hkv, num_kv_blocks, D) of keys in their own order; with causal mass
  int num_q_blocks;
  int num_kv_blocks;
  int num_words;
  int row_stride;  // floats from one row of logits to the next
  SelectTiles tiles;
  CUtensorMap q;  // not of float32
};

struct SelectBarriers {
  cutlass::arch::ClusterTransactionBarrier slot_full[kMaxQuerySlots];
  cutlass::arch::ClusterBarrier slot_empty[kMaxQuerySlots];
  // Every thread arrives for itself: racecheck does not see that __syncwarp puts a whole warp
  // before the one lane that would.
  cutlass::arch::ClusterBarrier means_full[kMeanBuffers];
  cutlass::arch::ClusterBarrier means_empty[kMeanBuffers];
  int sinks[kMeanBuffers];  // beside the means
};
static_assert(sizeof(SelectBarriers) <= kSelectBarrierBytes);

struct SelectShared {
  __device__ SelectShared(const SelectArgs& args, char* raw)
      : head_dim(static_cast<int>(args.params.problem.head_dim)),
        slot_bytes(query_slot_bytes(head_dim, static_cast<int>(args.params.blocking.block_size))) {
    slots = first_swizzled(raw);
    means = reinterpret_cast<uint32_t*>(slots + args.tiles.num_slots * slot_bytes);
    logits = reinterpret_cast<float*>(means + 2 * kMeanBuffers * query_means_floats(head_dim));
    scratch = reinterpret_cast<uint32_t*>(logits + args.tiles.rows * args.row_stride);
    barriers = reinterpret_cast<SelectBarriers*>(scratch + kRowWarps * kCutScratch);
  }

  __device__ SplitQueries means_of(int buffer) const {
    uint32_t* high = means + 2 * buffer * query_means_floats(head_dim);
    return SplitQueries{high, high + query_means_floats(head_dim)};
  }

  int head_dim;
  int slot_bytes;
  char* slots;
  uint32_t* means;    // (kMeanBuffers, 2, kLogitRows, query_stride)
  float* logits;      // (tile_rows, row_stride)
  uint32_t* scratch;  // (kRowWarps, kCutScratch)
  SelectBarriers* barriers;
};

// Some query blocks of one head.
struct SelectTile {
  int64_t b;
  int64_t hq;
  int first_block;
  int num_blocks;
};

// Calls visit(tile, i) for the tiles of a CTA, i from 0 on. Tiles are numbered from the longest
// rows to the shortest, across heads, and taken from both ends in turn: what is loaded for a short
// one comes in while a long one is in work.
template <class Visit>
__device__ void for_each_tile(const SelectArgs& args, Visit visit) {
  const Problem& problem = args.params.problem;
  const auto num_heads = static_cast<int>(problem.batch * problem.num_q_heads);
  const int tiles_per_head = (args.num_q_blocks + args.tiles.rows - 1) / args.tiles.rows;
  const int num_tiles = num_heads * tiles_per_head;
  const auto num_ctas = static_cast<int>(gridDim.x);
  for (int i = 0, nth = blockIdx.x; nth < num_tiles; ++i, nth += num_ctas) {
    const int from_end = i / 2 * num_ctas + static_cast<int>(blockIdx.x);
    const int idx = i % 2 == 0 ? from_end : num_tiles - 1 - from_end;
    const int head = idx % num_heads;
    SelectTile tile{};
    tile.b = head / static_cast<int>(problem.num_q_heads);
    tile.hq = head % static_cast<int>(problem.num_q_heads);
    tile.first_block = (tiles_per_head - 1 - idx / num_heads) * args.tiles.rows;
    tile.num_blocks = min(args.tiles.rows, args.num_q_blocks - tile.first_block);
    visit(tile, i);
  }
}

__device__ inline QueryBlock describe(const SelectArgs& args, const SelectTile& tile, int row) {
  const Problem& problem = args.params.problem;
  const Blocking& blocking = args.params.blocking;
  return query_block(tile.first_block + row, problem.num_q, problem.num_kv, blocking.block_size,
                     blocking.kv_block_size, blocking.segment_size, args.params.is_causal);
}

}  // namespace pbs::cuda
