// First pass of score_keys: the maximum and the sum of each query's weights over the keys of a
// part. Blocks of queries are the rows of the products, tiles of keys are their columns.
#pragma once

#include "common/score_keys/row_sums.cuh"
#include "key_parts.cuh"
#include "part_states.cuh"

namespace pbs::cuda::sm90 {

// (blocks_per_warpgroup, kScoreConsumers) states.
template <class Part>
__device__ ThreadState& thread_state(const Part& part, int nth_block, int thread) {
  return static_cast<ThreadState*>(part.table)[nth_block * kScoreConsumers + thread];
}

// Sums the products of a warpgroup: every fourth pair of a tile and a block, in this order.
template <class Traits>
__device__ void sum_rows(const ScoreArgs& args, const ScorePart<Traits, false>& part) {
  ScoreBarriers& barriers = *part.barriers;
  const ScoreProduct<Traits> multiply(part.queries, part.keys);
  const RowSums pass(args.params.scale * kLog2e);
  const int num_heads = part.heads_in_group(args, part.first_group);
  const int num_blocks = 2 * num_heads;
  const int num_states = blocks_per_warpgroup(num_heads);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = 0; i < num_states; ++i) {
    thread_state(part, i, thread) = ThreadState{{0.0f, 0.0f}, {-INFINITY, -INFINITY}};
  }
  DynamicRingState k{args.plan.num_stages};
  int block = uniform(thread / 128);
  const ScoreTurns turns(block);
  int nth = 0;  // index of its state
  bool is_first = true;
  for (int tile = 0; tile * kScoreTileRows < part.num_keys; ++tile) {
    const int num_left = part.num_keys - tile * kScoreTileRows;
    if (block < num_blocks) barriers.k_full[0][k.stage].wait(k.parity);
    for (; block < num_blocks; block += kScoreWarpgroups) {
      if (is_first) barriers.q_full[block / 2].wait(0);
      ThreadState state = thread_state(part, nth, thread);
      cute::Tensor scores = multiply(block, k.stage, turns);
      if (block + kScoreWarpgroups >= num_blocks) release(barriers.k_empty[k.stage]);
      if (num_left < kScoreTileRows) {
        CUTE_UNROLL
        for (int i = 0; i < cute::size(scores); ++i) {
          if (column_of(i, thread % 32) >= num_left) scores(i) = -INFINITY;
        }
      }
      pass.add(scores, is_first, state);
      thread_state(part, nth, thread) = state;
      if (++nth == num_states) {
        nth = 0;
        is_first = false;
      }
    }
    block -= num_blocks;
    k.advance(1);
  }
}

// Merges the partial states of all threads, for each query of the part's heads.
template <class Traits>
__device__ void write_row_sums(const ScoreArgs& args, const ScorePart<Traits, false>& part) {
  const int num_heads = part.heads_in_group(args, part.first_group);
  const int num_blocks = 2 * num_heads;
  const int num_states = blocks_per_warpgroup(num_heads);
  const int64_t first_head = part.first_head(args) + part.first_group * args.plan.heads_per_group;
  cutlass::arch::NamedBarrier::sync(kScoreConsumers, 0);
  for (int i = threadIdx.x; i < num_heads * kScoreTileRows; i += kScoreConsumers) {
    const int row = i % kScoreBlockRows;
    const int thread = row / 16 * 32 + row % 8 * 4;  // first thread of a quad
    RowState all;
    for (int warpgroup = 0; warpgroup < kScoreWarpgroups; ++warpgroup) {
      for (int nth = 0; nth < num_states; ++nth) {
        if ((warpgroup + nth * kScoreWarpgroups) % num_blocks != i / kScoreBlockRows) continue;
        for (int lane = 0; lane < 4; ++lane) {
          const ThreadState& state = thread_state(part, nth, warpgroup * 128 + thread + lane);
          const int r = row / 8 % 2;
          all = merge(all, RowState{state.max[r], state.sum[r]});
        }
      }
    }
    row_states(args,
               first_head + i / kScoreTileRows)[part.idx * kScoreTileRows + i % kScoreTileRows] =
        float2{all.max, all.sum};
  }
}

}  // namespace pbs::cuda::sm90
