// Draws the next query block of a CTA of attend.
#pragma once

#include "common/attend/draw_args.h"
#include "pbs/key_tiles.h"

namespace pbs::cuda {

// A query block, with everything that attention to its keys needs.
template <class Element>
struct AttendWork {
  KeyTiles tiles;  // total < 0: no work is left
  int32_t b;
  int32_t q_head;
  int32_t kv_head;
  int32_t perm_head;
  int32_t own_begin;  // row in k and v
  int32_t num_candidates;
  int32_t first_row;
  int32_t num_rows;
  const uint32_t* mask_words;
  Element* out;
  float* lse;
};

// Draws query blocks in the order of the workspace.
class WorkDrawer {
 public:
  __device__ explicit WorkDrawer(const DrawArgs& args) : args_(args) {}

  // The number of the next draw.
  __device__ int draw() const { return atomicAdd(args_.workspace + args_.layout.counter, 1); }

  // Fills in the query block of draw number draw_idx. Tiles have tile_keys keys.
  template <class Element>
  __device__ void fill(int draw_idx, int tile_keys, AttendWork<Element>& work) {
    const DrawnPlace drawn = drawn_place(args_.groups, draw_idx);
    if (drawn.rank >= args_.groups.num_groups()) {
      work.tiles.total = -1;
      return;
    }
    if (drawn.rank != rank_) {
      rank_ = drawn.rank;
      group_idx_ = args_.workspace[args_.layout.group_at + rank_];
    }
    const auto* sorted = reinterpret_cast<const int2*>(args_.workspace + args_.layout.sorted);
    const int2 ordered =
        sorted[static_cast<int64_t>(group_idx_) * args_.groups.blocks_per_group() + drawn.place];
    const WorkTile tile = work_tile(args_.groups, group_idx_, ordered.x);
    if (tile.head >= args_.groups.num_heads) {  // the group is short
      work.tiles.total = 0;
      work.num_rows = 0;
      return;
    }
    const AttendParams& params = args_.params;
    const Blocking& blocking = params.blocking;
    const Problem& problem = params.problem;
    const QueryBlock block = query_block(tile.q_block_idx, problem, blocking, params.is_causal);
    const int b = tile.head / static_cast<int>(problem.num_q_heads);
    const int hq = tile.head % static_cast<int>(problem.num_q_heads);
    const int64_t mask_row = static_cast<int64_t>(tile.head) * args_.groups.num_q_blocks;
    work.tiles = key_tiles(block, ordered.y, blocking.kv_block_size, tile_keys, params.is_causal);
    work.b = b;
    work.q_head = hq;
    work.kv_head = hq / static_cast<int>(heads_per_kv(problem));
    work.perm_head = hq / static_cast<int>(heads_per_perm(problem));
    work.own_begin = static_cast<int>(block.own_begin - params.first_k_row);
    work.num_candidates = static_cast<int>(block.num_candidates);
    work.first_row = static_cast<int>(block.first_row);
    work.num_rows = static_cast<int>(block.num_rows);
    work.mask_words = params.block_mask + (mask_row + tile.q_block_idx) * args_.num_mask_words;
    work.out = static_cast<Element*>(params.out.data) + b * params.out.batch_stride +
               hq * params.out.head_stride + block.first_row * params.out.row_stride;
    work.lse = params.lse + tile.head * problem.num_q + block.first_row;
  }

 private:
  const DrawArgs& args_;
  int rank_ = -1;  // rank of the group of the last draw
  int group_idx_ = 0;
};

}  // namespace pbs::cuda
