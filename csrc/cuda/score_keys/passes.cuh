// The two passes of score_keys: each query's maximum and sum over all keys, then the mean of its
// weights. Recomputing the scores of at most 128 queries is cheaper than holding 128 x Nkv of them.
#pragma once

#include "../exp2.cuh"
#include "walk.cuh"

namespace pbs::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// The sum of exp2(score - max) over some keys of one query. `max` is not always their maximum, but
// near enough to it that the sum is a number.
struct RowState {
  float max = -INFINITY;
  float sum = 0.0f;
};

__device__ inline RowState merge(const RowState& a, const RowState& b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return RowState{max, a.sum + b.sum};  // NaN stays NaN
  return RowState{max, a.sum * exp2_approx(a.max - max) + b.sum * exp2_approx(b.max - max)};
}

// Of each part, the states of all queries of a head (b * num_q_heads + hq).
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

// First pass. Queries are the rows of the products. Sums are taken relative to the maximum of the
// first tile: nothing is rounded on the way, so that a later score may lie 126 powers of two above
// it. Where one lies further above, or all of them too far below, the tiles of the chunk are
// multiplied again, with exact maxima.
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

  __device__ void begin_head(int chunk, int head) {
    __syncwarp();
    needs_max_ = chunk == 0;
    is_exact_ = false;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      kept_[r] = RowState{};
      if (chunk > 0) {
        const float2 kept = place(head, r);
        kept_[r] = RowState{kept.x, kept.y};
      }
      rows_[r] = RowState{kept_[r].max, 0.0f};
    }
  }

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
    if (needs_max_) {
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) raise(scores, r);
      needs_max_ = is_exact_;
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const float shift = shift_of(rows_[r].max);
      float sums[2] = {rows_[r].sum, 0.0f};
      CUTE_UNROLL
      for (int i = 0; i < cute::size(scores); ++i) {
        if (row_of(i) == r) sums[i % 2] += exp2_approx(scores(i) * factor_ - shift);
      }
      rows_[r].sum = sums[0] + sums[1];
    }
  }

  // Whether the tiles of the chunk are needed once more; if not, the rows are whole.
  __device__ bool repeats() {
    bool is_lost = false;
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const float sum = quad_sum(rows_[r].sum);
      if (is_exact_) {
        rows_[r] = merge(RowState{rows_[r].max, sum}, kept_[r]);
      } else {
        rows_[r] = RowState{shift_of(rows_[r].max), sum + kept_[r].sum};
        is_lost |= !(rows_[r].sum > 0.0f && rows_[r].sum < INFINITY);
      }
    }
    if (is_exact_ || !any_in_warpgroup(is_lost)) return false;
    is_exact_ = needs_max_ = true;
    rows_[0] = rows_[1] = RowState{};
    return true;
  }

  __device__ void end_head(int head) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      if (lane_ % 4 == 0) place(head, r) = float2{rows_[r].max, rows_[r].sum};
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
      const RowState all = merge_parts(pairs, kScorePairs, 1);
      row_states(args_, first_head + head)[part_.idx * kScoreRows + row] = float2{all.max, all.sum};
    }
  }

 private:
  // Where all scores are -inf: weights of 0, or of NaN where a score is NaN.
  __device__ static float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

  // A row of the chunks so far, which only this thread's quad uses.
  __device__ float2& place(int head, int r) const {
    return part_.head_table[(head * kScorePairs + score_pair()) * kScoreRows + row_ + 8 * r];
  }

  template <class Scores>
  __device__ void raise(const Scores& scores, int r) {
    float top = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      if (row_of(i) == r) top = fmaxf(top, scores(i));
    }
    const float max = fmaxf(rows_[r].max, quad_max(top) * factor_);
    rows_[r] = RowState{max, rows_[r].sum * exp2_approx(rows_[r].max - shift_of(max))};
  }

  const ScoreArgs& args_;
  const Part& part_;
  int lane_;
  int row_;
  float factor_;
  bool needs_max_ = true;
  bool is_exact_ = false;
  RowState kept_[kThreadRows];  // of the chunks before
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
        is_per_query_head_(args.params.problem.num_perm_heads == args.params.problem.num_q_heads),
        share_(1.0f /
               static_cast<float>(args.num_rows * (is_per_query_head_ ? 1 : part.heads_per_kv))),
        importance_(args.params.importance +
                    (part.b * args.params.problem.num_perm_heads +
                     part.kv_head * (is_per_query_head_ ? part.heads_per_kv : 1)) *
                        args.params.problem.num_kv),
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

  __device__ void begin_head(int, int) {}
  __device__ bool repeats() { return false; }
  __device__ void end_head(int) {}

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
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      float total = quad_sum(totals[r][0] + totals[r][1]);
      if (lane_ % 4 != 0) continue;
      const int key = row_ + 8 * r;
      if (is_per_query_head_) {
        write(step, key, total);
        continue;
      }
      float& kept = part_.tile_table[step.tile * kScoreKeys + key];  // of this thread alone
      if (step.head > 0) total += kept;
      if (step.head < part_.heads_per_kv - 1) {
        kept = total;
      } else {
        write(step, key, total);
      }
    }
  }

  // Keys behind the complete segments.
  __device__ void finish() {
    if (part_.idx != args_.parts.num_parts - 1) return;
    const int64_t num_kv = args_.params.problem.num_kv;
    for (int perm = 0; perm < (is_per_query_head_ ? part_.heads_per_kv : 1); ++perm) {
      for (int64_t i = args_.num_scored + threadIdx.x; i < num_kv; i += kScoreConsumers) {
        importance_[perm * num_kv + i] = 0.0f;
      }
    }
  }

 private:
  __device__ void write(const ScoreStep& step, int key, float total) const {
    const int tile = part_.first_tile + step.chunk * part_.tiles_per_chunk + step.tile;
    const int i = tile * kScoreKeys + key;
    if (i >= args_.num_scored) return;
    const int64_t perm = is_per_query_head_ ? step.head : 0;
    importance_[perm * args_.params.problem.num_kv + i] = total * share_;
  }

  const ScoreArgs& args_;
  const Part& part_;
  int lane_;
  int row_;
  float factor_;
  bool is_per_query_head_;
  float share_;
  float* importance_;  // of the first permutation that the part's heads belong to
  float* shifts_;      // (heads_per_kv, kScoreRows)
};

}  // namespace pbs::cuda
