// The producer: one warp draws query blocks, walks their bitmasks and loads Q, K and V by TMA.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "pbs/bitmask.h"
#include "traits.cuh"

namespace pbs::cuda {

template <class Traits>
class Producer {
 public:
  using Shared = typename Traits::SharedStorage;
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kMaxChunks = kKeys / 32;

  __device__ Producer(const AttendArgs& args, Shared& shared)
      : args_(args), params_(args.params), shared_(shared), lane_(threadIdx.x % 32) {
    const Problem& problem = params_.problem;
    num_words_ =
        static_cast<int>(num_mask_words(ceil_div(problem.num_kv, params_.blocking.kv_block_size)));
    chunk_rows_ = static_cast<int>(smaller(params_.blocking.kv_block_size, kKeys));
  }

  __device__ void run() {
    const int num_tiles = args_.order.num_q_blocks * args_.order.num_heads;
    while (true) {
      int tile_idx = 0;
      if (lane_ == 0) tile_idx = atomicAdd(args_.tile_counter, 1);
      tile_idx = __shfl_sync(~0u, tile_idx, 0);
      if (tile_idx >= num_tiles) {
        publish(-1, 0);
        return;
      }
      load_tile(tile_idx);
    }
  }

 private:
  __device__ void load_tile(int tile_idx) {
    const Problem& problem = params_.problem;
    const Blocking& blocking = params_.blocking;
    const WorkTile tile = work_tile(args_.order, tile_idx);
    const QueryBlock block =
        query_block(tile.q_block_idx, problem.num_q, problem.num_kv, blocking.block_size,
                    blocking.kv_block_size, blocking.segment_size, params_.is_causal);
    const uint32_t* words =
        params_.block_mask +
        (static_cast<int64_t>(tile.head) * args_.order.num_q_blocks + tile.q_block_idx) *
            num_words_;
    const int num_candidates = static_cast<int>(block.num_candidates);
    publish(tile_idx, count_selected(words, num_candidates));

    const int num_q_heads = static_cast<int>(problem.num_q_heads);
    const int hq = tile.head % num_q_heads;
    b_ = tile.head / num_q_heads;
    load_q(hq, static_cast<int>(block.first_row));
    head_ = hq / (num_q_heads / static_cast<int>(problem.num_kv_heads));
    const int own_end = static_cast<int>(block.own_end);
    for (rows_[0] = static_cast<int>(block.own_begin); rows_[0] < own_end; rows_[0] += kKeys) {
      load_kv(args_.k, args_.v, kKeys);
    }
    head_ = hq / (num_q_heads / static_cast<int>(problem.num_perm_heads));
    load_selected(words, num_candidates);
  }

  __device__ int count_selected(const uint32_t* words, int num_candidates) const {
    int count = 0;
    for (int w = lane_; w * 32 < num_candidates; w += 32) {
      count += __popc(candidate_bits(words[w], w, num_candidates));
    }
    return __reduce_add_sync(~0u, count);
  }

  // Hands the next query block to the consumers.
  __device__ void publish(int tile_idx, int num_selected) {
    shared_.info_empty[info_.stage()].wait(info_.parity() ^ 1);
    if (lane_ == 0) {
      shared_.info[info_.stage()] = {tile_idx, num_selected};
      shared_.info_full[info_.stage()].arrive();
    }
    info_.advance();
  }

  __device__ void load_q(int hq, int row) {
    shared_.q_empty[q_.stage()].wait(q_.parity() ^ 1);
    if (lane_ == 0) {
      auto& full = shared_.q_full[q_.stage()];
      full.arrive_and_expect_tx(Traits::kRows * Traits::kHeadDim * 2);
      auto* tile = shared_.q + q_.stage() * Traits::kRows * Traits::kHeadDim;
      for (int box = 0; box < Traits::kBoxes; ++box) {
        copy_box(args_.q, full, tile + box * Traits::kRows * Traits::kBoxColumns, box, row, hq);
      }
    }
    q_.advance();
  }

  // Fills tiles with the selected blocks, as many to a tile as fit.
  __device__ void load_selected(const uint32_t* words, int num_candidates) {
    int num_chunks = 0;
    const int chunks_per_tile = kKeys / chunk_rows_;
    const auto add_rows = [&](int row) {
#pragma unroll
      for (int i = 0; i < kMaxChunks; ++i) {
        if (i >= num_chunks) rows_[i] = row;  // a slot that stays empty repeats the last block
      }
      if (++num_chunks == chunks_per_tile) {
        load_kv(args_.k_perm, args_.v_perm, chunk_rows_);
        num_chunks = 0;
      }
    };
    const int kv_block_size = static_cast<int>(params_.blocking.kv_block_size);
    for (int base = 0; base * 32 < num_candidates; base += 32) {
      const int w = base + lane_;
      const uint32_t own =
          w * 32 < num_candidates ? candidate_bits(words[w], w, num_candidates) : 0;
      for (uint32_t lanes = __ballot_sync(~0u, own != 0); lanes != 0; lanes &= lanes - 1) {
        const int source = __ffs(lanes) - 1;
        for (uint32_t bits = __shfl_sync(~0u, own, source); bits != 0; bits &= bits - 1) {
          const int block_idx = (base + source) * 32 + __ffs(bits) - 1;
          for (int row = 0; row < kv_block_size; row += chunk_rows_) {
            add_rows(block_idx * kv_block_size + row);
          }
        }
      }
    }
    if (num_chunks != 0) load_kv(args_.k_perm, args_.v_perm, chunk_rows_);
  }

  // Loads one tile of K and V from the rows in rows_, box_rows at a time.
  __device__ void load_kv(const CUtensorMap& k, const CUtensorMap& v, int box_rows) {
    load_one(k, shared_.k, shared_.k_full[kv_.stage()], shared_.k_empty[kv_.stage()], box_rows);
    load_one(v, shared_.v, shared_.v_full[kv_.stage()], shared_.v_empty[kv_.stage()], box_rows);
    kv_.advance();
  }

  __device__ void load_one(const CUtensorMap& map, typename Traits::Element* ring,
                           cutlass::arch::ClusterTransactionBarrier& full,
                           cutlass::arch::ClusterBarrier& empty, int box_rows) {
    empty.wait(kv_.parity() ^ 1);
    if (lane_ == 0) {
      full.arrive_and_expect_tx(kKeys * Traits::kHeadDim * 2);
      typename Traits::Element* tile = ring + kv_.stage() * kKeys * Traits::kHeadDim;
#pragma unroll
      for (int chunk = 0; chunk < kMaxChunks; ++chunk) {
        if (chunk * box_rows >= kKeys) break;
        for (int box = 0; box < Traits::kBoxes; ++box) {
          copy_box(map, full, tile + (box * kKeys + chunk * box_rows) * Traits::kBoxColumns, box,
                   rows_[chunk], head_);
        }
      }
    }
    __syncwarp();
  }

  __device__ void copy_box(const CUtensorMap& map, cutlass::arch::ClusterTransactionBarrier& full,
                           typename Traits::Element* dst, int box, int row, int head) const {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                 static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), dst,
                                 box * Traits::kBoxColumns, row, head, b_);
  }

  const AttendArgs& args_;
  const AttendParams& params_;
  Shared& shared_;
  int lane_;
  int num_words_;
  int chunk_rows_;
  int b_ = 0;
  int head_ = 0;
  int rows_[kMaxChunks] = {};
  RingState<Traits::kQStages> q_;
  RingState<Traits::kStages> kv_;
  RingState<Traits::kStages> info_;
};

}  // namespace pbs::cuda
