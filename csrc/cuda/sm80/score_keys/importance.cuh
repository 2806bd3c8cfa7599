// Second pass of score_keys: the mean weight that the queries give each key. The block holds keys,
// and the queries of all heads of a key head stream through shared memory, so that sums stay in
// registers. Recomputing the scores of at most 128 queries is cheaper than storing 128 x Nkv
// scores.
#pragma once

#include "block.cuh"
#include "common/score_keys/weights.cuh"

namespace pbs::cuda::sm80 {

// The work of a CTA.
struct ImportancePart {
  int64_t b;
  int kv_head;
  int heads_per_kv;
  int num_q_stages;  // per head
  int idx;           // index among the parts of the key head
  int first_key;
  int num_keys;

  template <class Traits>
  __device__ ImportancePart(const ScoreArgs& args, Traits) {
    const Problem& problem = args.params.problem;
    const auto num_kv_heads = static_cast<int>(problem.num_kv_heads);
    heads_per_kv = static_cast<int>(problem.num_q_heads) / num_kv_heads;
    num_q_stages = (args.num_rows + Traits::kStageRows - 1) / Traits::kStageRows;
    idx = static_cast<int>(blockIdx.x) % args.importance.num_parts;
    const int walk = static_cast<int>(blockIdx.x) / args.importance.num_parts;
    kv_head = walk % num_kv_heads;
    b = walk / num_kv_heads;
    first_key = idx * args.importance.keys_per_part;
    num_keys = min(args.importance.keys_per_part, args.num_scored - first_key);
  }
};

// The order of the stages: for each block, its keys and then the queries of all heads.
template <class Traits>
class ImportanceWalk {
 public:
  using Rows = StageRows<typename Traits::Element>;

  __device__ ImportanceWalk(const ScoreArgs& args, const ImportancePart& part)
      : args_(args), part_(part) {}

  __device__ __forceinline__ Rows next() {
    if (block_ >= part_.num_keys) return Rows{};
    const int first = stage_ * Traits::kStageRows;
    if (head_ < 0) {
      const int row = block_ + first;
      const Rows keys = stage_rows<typename Traits::Element>(args_.params.k, part_.b, part_.kv_head,
                                                             int64_t{part_.first_key} + row,
                                                             part_.num_keys - row);
      if (++stage_ == Traits::kBlockStages) next_head();
      return keys;
    }
    const Rows queries = queries_from(first);
    if (++stage_ == part_.num_q_stages) next_head();
    return queries;
  }

 private:
  __device__ __forceinline__ Rows queries_from(int first) const {
    const Problem& problem = args_.params.problem;
    const int head = part_.kv_head * part_.heads_per_kv + head_;
    const auto first_query = static_cast<int>(problem.num_q) - args_.num_rows;
    Rows queries = stage_rows<typename Traits::Element>(
        args_.params.q, part_.b, head, first_query + first, args_.num_rows - first);
    queries.shifts = args_.shifts + (part_.b * problem.num_q_heads + head) * kScoreTileRows + first;
    return queries;
  }

  __device__ __forceinline__ void next_head() {
    stage_ = 0;
    if (++head_ < part_.heads_per_kv) return;
    head_ = -1;
    block_ += kScoreBlockRows;
  }

  const ScoreArgs& args_;
  const ImportancePart& part_;
  int block_ = 0;  // first key of the block, counted in the part
  int head_ = -1;  // index in the key head; -1 while the block itself is loaded
  int stage_ = 0;  // stage of the head
};

// Where the importance of keys is written.
class ImportanceRows {
 public:
  __device__ ImportanceRows(const ScoreArgs& args, const ImportancePart& part)
      : num_kv_(args.params.problem.num_kv),
        is_per_query_head_(args.params.problem.num_perm_heads == args.params.problem.num_q_heads),
        num_perms_(is_per_query_head_ ? part.heads_per_kv : 1),
        share_(1.0f / static_cast<float>(args.num_rows * (part.heads_per_kv / num_perms_))),
        first_(args.params.importance +
               (part.b * args.params.problem.num_perm_heads + part.kv_head * num_perms_) *
                   num_kv_) {}

  __device__ bool is_per_query_head() const { return is_per_query_head_; }

  // Writes a thread's totals of the block at first_key, of which num_keys belong to the part. Sets
  // the totals to 0.
  template <class Traits, int kRowTiles>
  __device__ __forceinline__ void write(const ScoreBlock<Traits>& block, int perm, int first_key,
                                        int num_keys,
                                        float (&totals)[kRowTiles][kThreadRows]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const int row = block.row(m) + 8 * r;
        const float total = quad_sum(totals[m][r]) * share_;
        if (block.lane() % 4 == 0 && row < num_keys) {
          first_[perm * num_kv_ + first_key + row] = total;
        }
        totals[m][r] = 0.0f;
      }
    }
  }

  // Keys after the complete segments.
  __device__ void clear_from(int64_t first_key) const {
    for (int perm = 0; perm < num_perms_; ++perm) {
      for (int64_t key = first_key + threadIdx.x; key < num_kv_; key += kScoreThreads) {
        first_[perm * num_kv_ + key] = 0.0f;
      }
    }
  }

 private:
  int64_t num_kv_;
  bool is_per_query_head_;
  int num_perms_;  // permutations of the key head
  float share_;
  float* first_;  // importance of the first permutation
};

template <class Traits>
__device__ void add_importance(const ScoreArgs& args, void* shared) {
  const ImportancePart part(args, Traits{});
  const ImportanceRows out(args, part);
  const float factor = args.params.scale * kLog2e;
  ImportanceWalk<Traits> walk(args, part);
  ScoreRing<Traits> ring(shared);
  ScoreBlock<Traits> block;
  ring.start(walk);
#pragma unroll 1
  for (int first = 0; first < part.num_keys; first += kScoreBlockRows) {
    const int key = part.first_key + first;
    const int num_keys = part.num_keys - first;
#pragma unroll 1
    for (int i = 0; i < Traits::kBlockStages; ++i) block.load(ring.advance(walk), i);
    float totals[Traits::kRowTiles][kThreadRows] = {};
#pragma unroll 1
    for (int head = 0; head < part.heads_per_kv; ++head) {
#pragma unroll 1
      for (int i = 0; i < part.num_q_stages; ++i) {
        const auto& queries = ring.advance(walk);
#pragma unroll
        for (int column = 0; column < Traits::kStageRows; column += Traits::kColumns) {
          typename Traits::Scores scores[Traits::kRowTiles];
          block.multiply(queries, column, scores);
#pragma unroll
          for (int m = 0; m < Traits::kRowTiles; ++m) {
            add_weights(scores[m], queries.shifts + column, factor, block.lane(), totals[m]);
          }
        }
      }
      if (out.is_per_query_head()) out.write(block, head, key, num_keys, totals);
    }
    if (!out.is_per_query_head()) out.write(block, 0, key, num_keys, totals);
  }
  if (part.idx == args.importance.num_parts - 1) out.clear_from(args.num_scored);
}

}  // namespace pbs::cuda::sm80
