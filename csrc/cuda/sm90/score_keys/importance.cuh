// Second pass of score_keys: the mean weight that the queries give each key. Blocks of keys are the
// rows of the products, the queries of a head are their columns. Recomputing the scores of at most
// 128 queries is cheaper than storing 128 x Nkv scores.
#pragma once

#include "common/score_keys/weights.cuh"
#include "key_parts.cuh"
#include "part_states.cuh"

namespace pbs::cuda::sm90 {

template <class Traits>
class Importance {
 public:
  using Part = ScorePart<Traits, true>;

  __device__ Importance(const ScoreArgs& args, const Part& part)
      : args_(args),
        part_(part),
        lane_(static_cast<int>(threadIdx.x) % 32),
        row_(row_of_thread(static_cast<int>(threadIdx.x) % 128)),
        factor_(args.params.scale * kLog2e),
        is_per_query_head_(args.params.problem.num_perm_heads == args.params.problem.num_q_heads),
        share_(1.0f /
               static_cast<float>(args.num_rows * (is_per_query_head_ ? 1 : part.heads_per_kv))),
        importance_(args.params.importance +
                    (part.b * args.params.problem.num_perm_heads +
                     part.kv_head * (is_per_query_head_ ? part.heads_per_kv : 1)) *
                        args.params.problem.num_kv),
        shifts_(static_cast<float*>(part.table)) {}

  // Computes the shifts from the states of the parts in the first pass. Runs in all consumers.
  __device__ void prepare() {
    const int64_t first_head = part_.first_head(args_);
    for (int i = threadIdx.x; i < part_.heads_per_kv * kScoreTileRows; i += kScoreConsumers) {
      const int row = i % kScoreTileRows;
      const RowState all = merge_parts(row_states(args_, first_head + i / kScoreTileRows) + row,
                                       args_.num_merged, 1);
      shifts_[i - row + place_of_shift(row)] = shift_of(all, row < args_.num_rows);
    }
    cutlass::arch::NamedBarrier::sync(kScoreConsumers, 0);
  }

  // A warpgroup takes every fourth block of a visit, for all heads of the group, so that its sums
  // stay in registers.
  __device__ void run() {
    ScoreBarriers& barriers = *part_.barriers;
    const ScoreProduct<Traits> multiply(part_.keys, part_.queries);
    const int warpgroup = uniform(static_cast<int>(threadIdx.x) / 128);
    const ScoreTurns turns(warpgroup);
    DynamicRingState first{args_.plan.num_stages};
    uint32_t passed = 0;  // parities of the barriers of the warpgroup
    for_each_visit<Traits, true>(args_, part_, [&](const ScoreVisit& visit) {
      DynamicRingState k = first;
      k.advance(warpgroup);
      for (int block = warpgroup; block < visit.num_stages; block += kScoreWarpgroups) {
        const int key = visit.first_key + block * kScoreBlockRows + row_;
        float totals[kThreadRows] = {};
        barriers.k_full[warpgroup][k.stage].wait(passed >> k.stage & 1);
        passed ^= 1u << k.stage;
        for (int head = 0; head < visit.num_heads; ++head) {
          if (block == warpgroup) barriers.q_full[head].wait(visit.idx & 1);
          const cute::Tensor scores = multiply(k.stage, head, turns);
          if (head == visit.num_heads - 1) release(barriers.k_empty[k.stage]);
          const int head_of_kv = visit.group * args_.plan.heads_per_group + head;
          add_weights(scores, shifts_ + head_of_kv * kScoreTileRows, factor_, lane_, totals);
          if (is_per_query_head_) write(head_of_kv, key, true, totals);
        }
        if (!is_per_query_head_) write(0, key, visit.group == 0, totals);
        k.advance(kScoreWarpgroups);
      }
      // Warpgroups without a block in the last round take turns like the others.
      const int num_in_last = (visit.num_stages - 1) % kScoreWarpgroups + 1;
      for (int head = 0; warpgroup >= num_in_last && head < visit.num_heads; ++head) {
        turns.await();
        turns.pass_on();
      }
      for (int i = 0; i < args_.plan.heads_per_group; ++i) {
        // A warpgroup without a block has not waited yet, and must not be a visit ahead.
        barriers.q_full[i].wait(visit.idx & 1);
        release(barriers.q_empty[i]);
      }
      first.advance(visit.num_stages);
    });
  }

  // Keys after the complete segments.
  __device__ void clear_rest() {
    if (part_.idx != args_.plan.num_parts - 1) return;
    const int64_t num_kv = args_.params.problem.num_kv;
    for (int perm = 0; perm < (is_per_query_head_ ? part_.heads_per_kv : 1); ++perm) {
      for (int64_t i = args_.num_scored + threadIdx.x; i < num_kv; i += kScoreConsumers) {
        importance_[perm * num_kv + i] = 0.0f;
      }
    }
  }

 private:
  // The keys of the thread, 8 apart, starting with `key`. Writes the totals and sets them to 0.
  __device__ void write(int perm, int key, bool is_first, float (&totals)[kThreadRows]) const {
    float* importance = importance_ + perm * args_.params.problem.num_kv;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const int i = key + 8 * r;
      const float total = quad_sum(totals[r]) * share_;
      if (lane_ % 4 == 0 && i < args_.num_scored) {
        importance[i] = is_first ? total : importance[i] + total;
      }
      totals[r] = 0.0f;
    }
  }

  const ScoreArgs& args_;
  const Part& part_;
  int lane_;
  int row_;
  float factor_;
  bool is_per_query_head_;
  float share_;
  float* importance_;  // starts at the first permutation of the part's heads
  float* shifts_;      // (heads_per_kv, kScoreTileRows), in the order of place_of_shift
};

}  // namespace pbs::cuda::sm90
