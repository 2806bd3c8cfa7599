// The scheduler: a warp that draws query blocks from a counter, ahead of everybody else, and loads
// their Q.
#pragma once

#include "epilogue.cuh"
#include "load.cuh"
#include "work.cuh"

namespace pbs::cuda::sm90 {

template <class Traits>
class Scheduler {
 public:
  using Shared = typename Traits::SharedStorage;
  using Work = typename Traits::Work;
  using Element = typename Traits::Element;

  __device__ Scheduler(const AttendArgs& args, Shared& shared)
      : args_(args), params_(args.params), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    cudaGridDependencySynchronize();  // the order is written
    while (true) {
      const Work& work = draw();
      if (work.tiles.total < 0) return;
      load_q(work);
    }
  }

 private:
  // Draws the next query block that visits anything, and publishes it.
  __device__ const Work& draw() {
    Work& work = shared_.work[work_.stage()];
    shared_.work_empty[work_.stage()].wait(work_.parity() ^ 1);
    while (true) {
      int draw_idx = 0;
      if (lane_ == 0) draw_idx = atomicAdd(args_.workspace + args_.layout.counter, 1);
      fill_work(__shfl_sync(~0u, draw_idx, 0), work);
      __syncwarp();
      if (work.tiles.total != 0) break;
      write_nothing<Traits>(params_, work);
      __syncwarp();
    }
    if (lane_ == 0) shared_.work_full[work_.stage()].arrive();
    work_.advance();
    return work;
  }

  // The query block that was drawn as number draw_idx, by one lane.
  __device__ void fill_work(int draw_idx, Work& work) {
    const DrawnPlace drawn = drawn_place(args_.groups, draw_idx);
    if (lane_ != 0) return;
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
    if (tile.head >= args_.groups.num_heads) {  // of a short group
      work.tiles.total = 0;
      work.num_rows = 0;
      return;
    }
    const Blocking& blocking = params_.blocking;
    const Problem& problem = params_.problem;
    const QueryBlock block = query_block(tile.q_block_idx, problem, blocking, params_.is_causal);
    const int b = tile.head / static_cast<int>(problem.num_q_heads);
    const int hq = tile.head % static_cast<int>(problem.num_q_heads);
    const int64_t mask_row = static_cast<int64_t>(tile.head) * args_.groups.num_q_blocks;
    work.tiles =
        key_tiles(block, ordered.y, blocking.kv_block_size, Traits::kKeys, params_.is_causal);
    work.b = b;
    work.q_head = hq;
    work.kv_head = hq / static_cast<int>(heads_per_kv(problem));
    work.perm_head = hq / static_cast<int>(heads_per_perm(problem));
    work.own_begin = static_cast<int>(block.own_begin - params_.first_k_row);
    work.num_candidates = static_cast<int>(block.num_candidates);
    work.first_row = static_cast<int>(block.first_row);
    work.num_rows = static_cast<int>(block.num_rows);
    work.mask_words = params_.block_mask + (mask_row + tile.q_block_idx) * args_.num_mask_words;
    work.out = static_cast<Element*>(params_.out.data) + b * params_.out.batch_stride +
               hq * params_.out.head_stride + block.first_row * params_.out.row_stride;
    work.lse = params_.lse + tile.head * problem.num_q + block.first_row;
  }

  __device__ void load_q(const Work& work) {
    shared_.q_empty[q_.stage()].wait(q_.parity() ^ 1);
    if (cute::elect_one_sync()) {
      auto& full = shared_.q_full[q_.stage()];
      full.arrive_and_expect_tx(Traits::kRows * Traits::kHeadDim * 2);
      copy_box(args_.q, full, shared_.q + q_.stage() * Traits::kRows * Traits::kHeadDim,
               work.first_row, 0, work.q_head, work.b);
    }
    __syncwarp();
    q_.advance();
  }

  const AttendArgs& args_;
  const AttendParams& params_;
  Shared& shared_;
  int lane_;
  int rank_ = -1;  // of the group drawn from last
  int group_idx_ = 0;
  RingState<Traits::kQStages> q_;
  RingState<Traits::kWorkStages> work_;
};

}  // namespace pbs::cuda::sm90
