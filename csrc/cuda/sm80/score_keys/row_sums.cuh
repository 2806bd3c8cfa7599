// First pass of score_keys: the maximum and the sum of each query's weights over the keys of a
// part. The block holds the queries of a head, and keys stream through shared memory.
#pragma once

#include "block.cuh"
#include "common/row_state.cuh"
#include "common/score_keys/row_sums.cuh"

namespace pbs::cuda::sm80 {

// The work of a CTA.
struct SumsPart {
  int64_t b;
  int head;  // query head
  int kv_head;
  int idx;  // index among the parts of the head
  int first_key;
  int num_keys;

  // Heads of a key head are adjacent: their CTAs read the same keys at about the same time.
  __device__ explicit SumsPart(const ScoreArgs& args) {
    const Problem& problem = args.params.problem;
    const auto num_kv_heads = static_cast<int>(problem.num_kv_heads);
    const int heads_per_kv = static_cast<int>(problem.num_q_heads) / num_kv_heads;
    int item = static_cast<int>(blockIdx.x);
    const int nth = item % heads_per_kv;
    item /= heads_per_kv;
    idx = item % args.sums.num_parts;
    item /= args.sums.num_parts;
    kv_head = item % num_kv_heads;
    b = item / num_kv_heads;
    head = kv_head * heads_per_kv + nth;
    first_key = idx * args.sums.keys_per_part;
    num_keys = min(args.sums.keys_per_part, args.num_scored - first_key);
  }
};

// The order of the stages: first queries, then keys.
template <class Traits>
class SumsWalk {
 public:
  using Rows = StageRows<typename Traits::Element>;

  __device__ SumsWalk(const ScoreArgs& args, const SumsPart& part) : args_(args), part_(part) {}

  __device__ __forceinline__ Rows next() {
    using Element = typename Traits::Element;
    const ScoreKeysParams& params = args_.params;
    const int first = first_;
    first_ += Traits::kStageRows;
    if (first < 0) {
      const int row = first + kScoreBlockRows;
      const auto first_query = static_cast<int>(params.problem.num_q) - args_.num_rows;
      return stage_rows<Element>(params.q, part_.b, part_.head, first_query + row,
                                 args_.num_rows - row);
    }
    if (first >= part_.num_keys) return Rows{};
    return stage_rows<Element>(params.k, part_.b, part_.kv_head, part_.first_key + first,
                               part_.num_keys - first);
  }

 private:
  const ScoreArgs& args_;
  const SumsPart& part_;
  int first_ = -kScoreBlockRows;  // row of the next stage, among the keys
};

// Merges the states of the lanes of a quad for their rows, and writes them.
template <class Traits>
__device__ void write_row_sums(const ScoreArgs& args, const SumsPart& part,
                               const ScoreBlock<Traits>& block,
                               const ThreadState (&states)[Traits::kRowTiles]) {
  const int64_t head = part.b * args.params.problem.num_q_heads + part.head;
  float2* out = args.state + (head * args.sums.num_parts + part.idx) * kScoreTileRows;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      RowState all{states[m].max[r], states[m].sum[r]};
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        all = merge(all, RowState{__shfl_xor_sync(~0u, all.max, lanes),
                                  __shfl_xor_sync(~0u, all.sum, lanes)});
      }
      if (block.lane() % 4 == 0) out[block.row(m) + 8 * r] = float2{all.max, all.sum};
    }
  }
}

template <class Traits>
__device__ void sum_rows(const ScoreArgs& args, void* shared) {
  const SumsPart part(args);
  SumsWalk<Traits> walk(args, part);
  ScoreRing<Traits> ring(shared);
  ScoreBlock<Traits> block;
  ring.start(walk);
#pragma unroll 1
  for (int i = 0; i < Traits::kBlockStages; ++i) block.load(ring.advance(walk), i);
  const RowSums pass(args.params.scale * kLog2e);
  ThreadState states[Traits::kRowTiles];
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    states[m] = ThreadState{{0.0f, 0.0f}, {-INFINITY, -INFINITY}};
  }
#pragma unroll 1
  for (int first = 0; first < part.num_keys; first += Traits::kStageRows) {
    const auto& keys = ring.advance(walk);
#pragma unroll
    for (int column = 0; column < Traits::kStageRows; column += Traits::kColumns) {
      typename Traits::Scores scores[Traits::kRowTiles];
      block.multiply(keys, column, scores);
      const int num_left = part.num_keys - first - column;
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        if (num_left < Traits::kColumns) {
#pragma unroll
          for (int i = 0; i < cute::size(scores[m]); ++i) {
            if (column_of(i, block.lane()) >= num_left) scores[m](i) = -INFINITY;
          }
        }
        pass.add(scores[m], first + column == 0, states[m]);
      }
    }
  }
  write_row_sums<Traits>(args, part, block, states);
}

}  // namespace pbs::cuda::sm80
