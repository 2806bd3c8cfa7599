// The two passes of score_keys: each query's maximum and sum over all keys, then the mean of its
// weights. Recomputing the scores of at most 128 queries is cheaper than holding 128 x Nkv of them.
#pragma once

#include "../exp2.cuh"
#include "walk.cuh"

namespace pbs::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// The online maximum and sum of exp2(score - max) over some keys of one query.
struct RowState {
  float max = -INFINITY;
  float sum = 0.0f;
};

__device__ inline RowState merge(const RowState& a, const RowState& b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return RowState{max, a.sum + b.sum};  // NaN stays NaN
  return RowState{max, a.sum * exp2_approx(a.max - max) + b.sum * exp2_approx(b.max - max)};
}

// Of each part, the state of all queries of a head (b * num_q_heads + hq).
__device__ inline float2* row_states(const ScoreArgs& args, int64_t head) {
  return args.state + head * args.parts.num_parts * kScoreRows;
}

// What one query's states of every step-th part come to.
__device__ inline RowState merge_parts(const float2* states, int num_parts, int step) {
  RowState all;
#pragma unroll 8
  for (int p = 0; p < num_parts; p += step) {
    const float2 state = states[p * kScoreRows];
    all = merge(all, RowState{state.x, state.y});
  }
  return all;
}

// First pass. Queries are the rows of the products.
template <class Traits>
class RowSums {
 public:
  using Part = ScorePart<Traits>;

  __device__ RowSums(const ScoreArgs& args, const Part& part)
      : args_(args),
        part_(part),
        lane_(threadIdx.x % 32),
        row_(row_of_thread(static_cast<int>(threadIdx.x) % kScorePairThreads)),
        factor_(args.params.scale * kLog2e) {}

  __device__ void begin_head() { rows_[0] = rows_[1] = RowState{}; }

  template <class Scores>
  __device__ void take(Scores& scores, const ScoreStep& step) {
    const int tile = part_.first_tile + step.chunk * part_.tiles_per_chunk + step.tile;
    const int num_keys = args_.num_scored - tile * kScoreKeys;
    if (num_keys < kScoreKeys) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(scores); ++i) {
        if (column_of(i, lane_) >= num_keys) scores(i) = -INFINITY;
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) add_row(scores, r);
  }

  // Adds the rows of a chunk to those of the chunks before, in a place that only this thread uses.
  __device__ void end_head(int chunk, int head) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      RowState all = rows_[r];
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        all = merge(all, RowState{__shfl_xor_sync(~0u, all.max, lanes),
                                  __shfl_xor_sync(~0u, all.sum, lanes)});
      }
      if (lane_ % 4 != 0) continue;
      float2& kept =
          part_.head_table[(head * kScorePairs + score_pair()) * kScoreRows + row_ + 8 * r];
      if (chunk > 0) all = merge(RowState{kept.x, kept.y}, all);
      kept = float2{all.max, all.sum};
    }
  }

  // What both pairs found.
  __device__ void finish() {
    cutlass::arch::NamedBarrier::sync(kScoreConsumers, 0);
    const int64_t first_head = static_cast<int64_t>(part_.b) * args_.params.problem.num_q_heads +
                               part_.kv_head * part_.heads_per_kv;
    for (int i = threadIdx.x; i < part_.heads_per_kv * kScoreRows; i += kScoreConsumers) {
      const int head = i / kScoreRows;
      const int row = i % kScoreRows;
      const float2* pairs = part_.head_table + head * kScorePairs * kScoreRows + row;
      const RowState all = merge(RowState{pairs[0].x, pairs[0].y},
                                 RowState{pairs[kScoreRows].x, pairs[kScoreRows].y});
      row_states(args_, first_head + head)[part_.idx * kScoreRows + row] = float2{all.max, all.sum};
    }
  }

 private:
  template <class Scores>
  __device__ void add_row(const Scores& scores, int r) {
    float top = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      if (row_of(i) == r) top = fmaxf(top, scores(i));
    }
    top = fmaxf(rows_[r].max, top * factor_);
    // All at -inf: weights of 0, or of NaN where a score is NaN.
    const float base = top == -INFINITY ? 0.0f : top;
    float sums[2] = {rows_[r].sum * exp2_approx(rows_[r].max - base), 0.0f};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      if (row_of(i) == r) sums[i % 2] += exp2_approx(scores(i) * factor_ - base);
    }
    rows_[r] = RowState{top, sums[0] + sums[1]};
  }

  const ScoreArgs& args_;
  const Part& part_;
  int lane_;
  int row_;
  float factor_;
  RowState rows_[kThreadRows];
};

// Second pass. Keys are the rows of the products.
template <class Traits>
class Importance {
 public:
  using Part = ScorePart<Traits>;

  __device__ Importance(const ScoreArgs& args, const Part& part)
      : args_(args),
        part_(part),
        lane_(threadIdx.x % 32),
        row_(row_of_thread(static_cast<int>(threadIdx.x) % kScorePairThreads)),
        factor_(args.params.scale * kLog2e),
        heads_per_perm_(
            static_cast<int>(args.params.problem.num_q_heads / args.params.problem.num_perm_heads)),
        share_(1.0f / static_cast<float>(args.num_rows * heads_per_perm_)),
        shifts_(reinterpret_cast<float*>(part.head_table)) {}

  // From what the parts found in the first pass: a weight is exp2(score + shift). By all consumers.
  __device__ void prepare() {
    const int64_t first_head = static_cast<int64_t>(part_.b) * args_.params.problem.num_q_heads +
                               part_.kv_head * part_.heads_per_kv;
    for (int i = threadIdx.x; i < part_.heads_per_kv * kScoreRows; i += kScoreConsumers) {
      const RowState all = merge_parts(
          row_states(args_, first_head + i / kScoreRows) + i % kScoreRows, args_.num_merged, 1);
      // A query that sees nothing but -inf weighs nothing, as one that does not exist.
      const bool weighs = i % kScoreRows < args_.num_rows && all.sum != 0.0f;
      shifts_[i] = weighs ? -(all.max + log2f(all.sum)) : -INFINITY;
    }
    cutlass::arch::NamedBarrier::sync(kScoreConsumers, 0);
  }

  __device__ void begin_head() {}
  __device__ void end_head(int, int) {}

  template <class Scores>
  __device__ void take(const Scores& scores, const ScoreStep& step) {
    const float* shifts = shifts_ + step.head * kScoreRows + lane_ % 4 * 2;
    float totals[kThreadRows][2] = {};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); i += 4) {
      const float2 two = *reinterpret_cast<const float2*>(shifts + i * 2);
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        totals[r][0] += exp2_approx(scores(i + 2 * r) * factor_ + two.x);
        totals[r][1] += exp2_approx(scores(i + 2 * r + 1) * factor_ + two.y);
      }
    }
    const int head_in_perm = heads_per_perm_ == 1 ? 0 : step.head;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      float total = quad_sum(totals[r][0] + totals[r][1]);
      if (lane_ % 4 != 0) continue;
      const int key = row_ + 8 * r;
      float& kept = part_.tile_table[step.tile * kScoreKeys + key];  // of this thread alone
      if (head_in_perm > 0) total += kept;
      if (head_in_perm < heads_per_perm_ - 1) {
        kept = total;
      } else {
        write(step, key, total * share_);
      }
    }
  }

  // Keys behind the complete segments.
  __device__ void finish() {
    if (part_.idx != args_.parts.num_parts - 1) return;
    const int64_t num_kv = args_.params.problem.num_kv;
    const int perms_per_kv = part_.heads_per_kv / heads_per_perm_;
    for (int perm = 0; perm < perms_per_kv; ++perm) {
      float* importance = importance_of(perm * heads_per_perm_);
      for (int64_t i = args_.num_scored + threadIdx.x; i < num_kv; i += kScoreConsumers) {
        importance[i] = 0.0f;
      }
    }
  }

 private:
  // Of the permutation that the part's head belongs to.
  __device__ float* importance_of(int head) const {
    const Problem& problem = args_.params.problem;
    const int64_t perm_head = part_.b * problem.num_perm_heads +
                              (part_.kv_head * part_.heads_per_kv + head) / heads_per_perm_;
    return args_.params.importance + perm_head * problem.num_kv;
  }

  __device__ void write(const ScoreStep& step, int key, float value) const {
    const int tile = part_.first_tile + step.chunk * part_.tiles_per_chunk + step.tile;
    const int i = tile * kScoreKeys + key;
    if (i < args_.num_scored) importance_of(step.head)[i] = value;
  }

  const ScoreArgs& args_;
  const Part& part_;
  int lane_;
  int row_;
  float factor_;
  int heads_per_perm_;
  float share_;
  float* shifts_;  // (heads_per_kv, kScoreRows)
};

}  // namespace pbs::cuda
