// The scheduler: a warp that draws query blocks from a counter, ahead of everybody else, and loads
// their Q.
#pragma once

#include "epilogue.cuh"
#include "load.cuh"
#include "work.cuh"

namespace pbs::cuda {

template <class Traits>
class Scheduler {
 public:
  using Shared = typename Traits::SharedStorage;
  using Work = typename Traits::Work;
  using Element = typename Traits::Element;

  __device__ Scheduler(const AttendArgs& args, Shared& shared)
      : args_(args), params_(args.params), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    while (draw()) load_q();
  }

 private:
  // Draws the next query block that visits anything, and publishes it; false if there is none.
  __device__ bool draw() {
    Work& work = shared_.work[work_.stage()];
    shared_.work_empty[work_.stage()].wait(work_.parity() ^ 1);
    bool is_work = true;
    while (true) {
      int draw_idx = 0;
      if (lane_ == 0) draw_idx = atomicAdd(args_.workspace + args_.layout.counter, 1);
      is_work = find(__shfl_sync(~0u, draw_idx, 0));
      if (!is_work) break;
      if (tile_.head < args_.groups.num_heads) {
        describe(work);
        __syncwarp();
        if (work.tiles.total > 0) break;
        write_nothing<Traits>(params_, work);
        __syncwarp();
      }
    }
    if (lane_ == 0) {
      if (!is_work) work.tiles.total = -1;
      shared_.work_full[work_.stage()].arrive();
    }
    work_.advance();
    return is_work;
  }

  // The query block that was drawn as number draw_idx; false if all are.
  __device__ bool find(int draw_idx) {
    const int blocks_per_group = args_.groups.blocks_per_group();
    const int rank = draw_idx / blocks_per_group;
    if (rank >= args_.groups.num_groups()) return false;
    const int group_idx = args_.workspace[args_.layout.group_at + rank];
    const int64_t first = static_cast<int64_t>(group_idx) * blocks_per_group;
    const int block_idx =
        args_.workspace[args_.layout.sorted + first + draw_idx % blocks_per_group];
    tile_ = work_tile(args_.groups, group_idx, block_idx);
    num_selected_ = args_.workspace[args_.layout.num_selected + first + block_idx];
    return true;
  }

  __device__ void describe(Work& work) const {
    if (lane_ != 0) return;
    const Blocking& blocking = params_.blocking;
    const Problem& problem = params_.problem;
    const QueryBlock block =
        query_block(tile_.q_block_idx, problem.num_q, problem.num_kv, blocking.block_size,
                    blocking.kv_block_size, blocking.segment_size, params_.is_causal);
    const int64_t mask_row =
        static_cast<int64_t>(tile_.head) * args_.groups.num_q_blocks + tile_.q_block_idx;
    const int b = tile_.head / static_cast<int>(problem.num_q_heads);
    const int hq = tile_.head % static_cast<int>(problem.num_q_heads);
    work.tiles =
        key_tiles(block, num_selected_, blocking.kv_block_size, Traits::kKeys, params_.is_causal);
    work.b = b;
    work.kv_head = hq / static_cast<int>(problem.num_q_heads / problem.num_kv_heads);
    work.perm_head = hq / static_cast<int>(problem.num_q_heads / problem.num_perm_heads);
    work.own_begin = static_cast<int>(block.own_begin);
    work.num_candidates = static_cast<int>(block.num_candidates);
    work.num_rows = static_cast<int>(block.num_rows);
    work.mask_words = params_.block_mask + mask_row * args_.num_mask_words;
    work.out = static_cast<Element*>(params_.out.data) + b * params_.out.batch_stride +
               hq * params_.out.head_stride + block.first_row * params_.out.row_stride;
    work.lse = params_.lse + tile_.head * problem.num_q + block.first_row;
  }

  __device__ void load_q() {
    shared_.q_empty[q_.stage()].wait(q_.parity() ^ 1);
    if (lane_ == 0) {
      const int num_q_heads = static_cast<int>(params_.problem.num_q_heads);
      auto& full = shared_.q_full[q_.stage()];
      full.arrive_and_expect_tx(Traits::kRows * Traits::kHeadDim * 2);
      copy_box(args_.q, full, shared_.q + q_.stage() * Traits::kRows * Traits::kHeadDim,
               tile_.q_block_idx * static_cast<int>(params_.blocking.block_size), 0,
               tile_.head % num_q_heads, tile_.head / num_q_heads);
    }
    __syncwarp();
    q_.advance();
  }

  const AttendArgs& args_;
  const AttendParams& params_;
  Shared& shared_;
  int lane_;
  WorkTile tile_{};  // drawn last
  int num_selected_ = 0;
  RingState<Traits::kQStages> q_;
  RingState<Traits::kWorkStages> work_;
};

}  // namespace pbs::cuda
