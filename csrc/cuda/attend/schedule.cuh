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

  __device__ Scheduler(const AttendArgs& args, Shared& shared)
      : args_(args), params_(args.params), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    while (true) {
      const Work& work = draw();
      if (work.tiles.total < 0) return;
      load_q(work.tile);
    }
  }

 private:
  // Draws the next query block that visits anything, and publishes it.
  __device__ const Work& draw() {
    Work& work = shared_.work[work_.stage()];
    shared_.work_empty[work_.stage()].wait(work_.parity() ^ 1);
    do {
      int tile_idx = 0;
      if (lane_ == 0) tile_idx = atomicAdd(args_.tile_counter, 1);
      describe(__shfl_sync(~0u, tile_idx, 0), work);
      if (work.tiles.total == 0) write_nothing<Traits>(params_, work.tile);
    } while (work.tiles.total == 0);
    if (lane_ == 0) shared_.work_full[work_.stage()].arrive();
    work_.advance();
    return work;
  }

  __device__ void describe(int tile_idx, Work& work) const {
    const WorkTile tile = work_tile(args_.order, tile_idx);
    __syncwarp();
    if (tile_idx >= args_.order.num_q_blocks * args_.order.num_heads) {
      if (lane_ == 0) work.tiles.total = -1;
    } else {
      const Blocking& blocking = params_.blocking;
      const QueryBlock block = query_block(
          tile.q_block_idx, params_.problem.num_q, params_.problem.num_kv, blocking.block_size,
          blocking.kv_block_size, blocking.segment_size, params_.is_causal);
      const int num_candidates = static_cast<int>(block.num_candidates);
      const int num_selected = count_selected(mask_words(args_, tile), num_candidates);
      if (lane_ == 0) {
        work = {key_tiles(block, num_selected, blocking.kv_block_size, Traits::kKeys,
                          params_.is_causal),
                tile, static_cast<int>(block.own_begin), num_candidates};
      }
    }
    __syncwarp();
  }

  __device__ int count_selected(const uint32_t* words, int num_candidates) const {
    int count = 0;
    for (int w = lane_; w * 32 < num_candidates; w += 32) {
      count += __popc(candidate_bits(words[w], w, num_candidates));
    }
    return __reduce_add_sync(~0u, count);
  }

  __device__ void load_q(const WorkTile& tile) {
    shared_.q_empty[q_.stage()].wait(q_.parity() ^ 1);
    if (lane_ == 0) {
      const int num_q_heads = static_cast<int>(params_.problem.num_q_heads);
      auto& full = shared_.q_full[q_.stage()];
      full.arrive_and_expect_tx(Traits::kRows * Traits::kHeadDim * 2);
      copy_box(args_.q, full, shared_.q + q_.stage() * Traits::kRows * Traits::kHeadDim,
               tile.q_block_idx * static_cast<int>(params_.blocking.block_size), 0,
               tile.head % num_q_heads, tile.head / num_q_heads);
    }
    __syncwarp();
    q_.advance();
  }

  const AttendArgs& args_;
  const AttendParams& params_;
  Shared& shared_;
  int lane_;
  RingState<Traits::kQStages> q_;
  RingState<Traits::kWorkStages> work_;
};

}  // namespace pbs::cuda
