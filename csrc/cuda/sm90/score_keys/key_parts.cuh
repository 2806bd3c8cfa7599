// How the CTAs of score_keys walk over keys and queries. One warp loads them with TMA. Four
// warpgroups multiply independently, so that the tensor cores are busy while others turn products
// into weights. The queries of several heads stay in shared memory, and keys stream through it.
#pragma once

#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include <cute/arch/cluster_sm90.hpp>

#include "pbs/params.h"
#include "pbs/sm90/score_parts.h"
#include "sm90/ring.cuh"
#include "sm90/tma.cuh"
#include "sm90/turns.cuh"
#include "sm90/warpgroup.cuh"

namespace pbs::cuda::sm90 {

using cute::Int;
using cute::Shape;

struct ScoreArgs {
  ScoreKeysParams params;
  ScorePlan plan;
  float2* state;   // (B, Hq, num_states, kScoreTileRows): maximum and sum of each query's weights
  int num_states;  // parts in the first pass
  int num_merged;  // parts that the second pass has to merge
  int num_rows;    // queries per head
  int num_scored;  // keys per head
  int chunk_keys;  // keys of a part that each group of heads reads before the next group does
  CUtensorMap q;   // boxes of a block in the first pass, of a tile in the second
  CUtensorMap k;   // the opposite
};

constexpr int kScoreConsumers = 128 * kScoreWarpgroups;
constexpr int kScoreThreads = kScoreConsumers + 128;  // with the producer in its own warpgroup

template <class Element_, int kHeadDim_>
struct ScoreTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileSize = kScoreTileRows * kHeadDim;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          Shape<Int<kScoreBlockRows>, Int<kScoreTileRows>, Int<kHeadDim>>>()));
  using Atom = decltype(cutlass::gemm::collective::detail::ss_smem_selector<
                        cute::GMMA::Major::K, Element, Int<kScoreTileRows>, Int<kHeadDim>>());
  // The last dimension counts blocks or tiles. Only as many exist as the launch allocated.
  using Blocks = decltype(cute::tile_to_shape(
      Atom{}, Shape<Int<kScoreBlockRows>, Int<kHeadDim>, Int<2 * kMostScoreStages>>{}));
  using Tiles = decltype(cute::tile_to_shape(
      Atom{}, Shape<Int<kScoreTileRows>, Int<kHeadDim>, Int<kMostScoreStages>>{}));
};

// Each warpgroup has its own barrier per stage of keys. A shared barrier could complete twice
// between two waits of the same warpgroup.
struct ScoreBarriers {
  cutlass::arch::ClusterTransactionBarrier q_full[kMostScoreHeads];
  cutlass::arch::ClusterTransactionBarrier k_full[kScoreWarpgroups][kMostScoreStages];
  cutlass::arch::ClusterBarrier q_empty[kMostScoreHeads];
  cutlass::arch::ClusterBarrier k_empty[kMostScoreStages];
};
static_assert(sizeof(ScoreBarriers) <= kScoreBarrierBytes);

// The work of a CTA, and its shared memory.
template <class Traits, bool kKeysAreRows>
struct ScorePart {
  using Element = typename Traits::Element;
  static constexpr int kStageRows = kKeysAreRows ? kScoreBlockRows : kScoreTileRows;

  __device__ ScorePart(const ScoreArgs& args, char* raw) {
    const Problem& problem = args.params.problem;
    const ScorePlan& plan = args.plan;
    const int num_kv_heads = static_cast<int>(problem.num_kv_heads);
    heads_per_kv = static_cast<int>(problem.num_q_heads) / num_kv_heads;
    idx = static_cast<int>(blockIdx.x) % plan.num_parts;
    int walk = static_cast<int>(blockIdx.x) / plan.num_parts;
    first_group = 0;
    end_group = plan.num_groups;
    if (!kKeysAreRows) {
      first_group = walk % plan.num_groups;
      end_group = first_group + 1;
      walk /= plan.num_groups;
    }
    b = walk / num_kv_heads;
    kv_head = walk % num_kv_heads;
    first_key = idx * plan.keys_per_part;
    num_keys = min(plan.keys_per_part, args.num_scored - first_key);
    queries = reinterpret_cast<Element*>(first_swizzled(raw));
    keys = queries + plan.heads_per_group * Traits::kTileSize;
    barriers =
        reinterpret_cast<ScoreBarriers*>(keys + plan.num_stages * kStageRows * Traits::kHeadDim);
    table = reinterpret_cast<char*>(barriers) + kScoreBarrierBytes;
  }

  __device__ int heads_in_group(const ScoreArgs& args, int group) const {
    const int heads_per_group = args.plan.heads_per_group;
    return min(heads_per_group, heads_per_kv - group * heads_per_group);
  }

  // The first query head of the part's key head, b * num_q_heads + hq.
  __device__ int64_t first_head(const ScoreArgs& args) const {
    return b * args.params.problem.num_q_heads + kv_head * heads_per_kv;
  }

  int idx;  // index among the parts of its key head
  int b;
  int kv_head;
  int heads_per_kv;
  int first_group;
  int end_group;
  int first_key;
  int num_keys;
  Element* queries;  // heads_per_group tiles
  Element* keys;     // num_stages of kStageRows
  ScoreBarriers* barriers;
  void* table;  // table of the pass
};

// The keys that one group of heads reads before the next group does.
struct ScoreVisit {
  int idx;  // in the order of the CTA
  int group;
  int num_heads;
  int first_key;
  int num_stages;  // stages of keys to load
};

template <class Traits, bool kKeysAreRows, class Body>
__device__ void for_each_visit(const ScoreArgs& args, const ScorePart<Traits, kKeysAreRows>& part,
                               Body body) {
  constexpr int kStageRows = ScorePart<Traits, kKeysAreRows>::kStageRows;
  ScoreVisit visit{};
  for (int begin = 0; begin < part.num_keys; begin += args.chunk_keys) {
    const int num_keys = min(args.chunk_keys, part.num_keys - begin);
    for (visit.group = part.first_group; visit.group < part.end_group; ++visit.group, ++visit.idx) {
      visit.num_heads = part.heads_in_group(args, visit.group);
      visit.first_key = part.first_key + begin;
      visit.num_stages = (num_keys + kStageRows - 1) / kStageRows;
      body(visit);
    }
  }
}

// Loads the operands of the products. Runs in one warp.
template <class Traits, bool kKeysAreRows>
class ScoreLoader {
 public:
  using Part = ScorePart<Traits, kKeysAreRows>;

  __device__ ScoreLoader(const ScoreArgs& args, const Part& part)
      : args_(args), part_(part), k_{args.plan.num_stages} {}

  // Loads are roughly in the order of the products. But no product ends before the queries of all
  // heads are loaded, so the queries must not wait for a stage that a product frees.
  __device__ void run() {
    for_each_visit<Traits, kKeysAreRows>(args_, part_, [&](const ScoreVisit& visit) {
      int stage = 0;
      for (int i = 0; i < args_.plan.heads_per_group; ++i) {
        load_queries(visit, i);
        if (stage < min(args_.plan.num_stages, visit.num_stages)) load_keys(visit, stage++);
      }
      while (stage < visit.num_stages) load_keys(visit, stage++);
    });
  }

 private:
  __device__ void load_queries(const ScoreVisit& visit, int i) {
    constexpr int kBoxRows = kKeysAreRows ? kScoreTileRows : kScoreBlockRows;
    ScoreBarriers& barriers = *part_.barriers;
    barriers.q_empty[i].wait((visit.idx & 1) ^ 1);
    if (cute::elect_one_sync()) {
      // The last group may have fewer heads. The barriers of the missing heads complete with the
      // others.
      const bool exists = i < visit.num_heads;
      barriers.q_full[i].arrive_and_expect_tx(exists ? score_tile_bytes(Traits::kHeadDim) : 0);
      const int head =
          part_.kv_head * part_.heads_per_kv + visit.group * args_.plan.heads_per_group + i;
      for (int row = 0; exists && row < kScoreTileRows; row += kBoxRows) {
        copy_box(args_.q, barriers.q_full[i],
                 part_.queries + i * Traits::kTileSize + row * Traits::kHeadDim, row, 0, head,
                 part_.b);
      }
    }
    __syncwarp();
  }

  __device__ void load_keys(const ScoreVisit& visit, int i) {
    constexpr int kStageSize = Part::kStageRows * Traits::kHeadDim;
    ScoreBarriers& barriers = *part_.barriers;
    barriers.k_empty[k_.stage].wait(k_.parity ^ 1);
    if (cute::elect_one_sync()) {
      auto& full = barriers.k_full[kKeysAreRows ? i % kScoreWarpgroups : 0][k_.stage];
      full.arrive_and_expect_tx(2 * kStageSize);
      copy_box(args_.k, full, part_.keys + k_.stage * kStageSize,
               visit.first_key + i * Part::kStageRows, 0, part_.kv_head, part_.b);
    }
    __syncwarp();
    k_.advance(1);
  }

  const ScoreArgs& args_;
  const Part& part_;
  DynamicRingState k_;
};

// The first barrier that CUTLASS leaves to its users is the one of all consumers.
constexpr int kScoreTurnBarrier =
    static_cast<int>(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier) + 1;
using ScoreTurns = Turns<kScoreWarpgroups, kScoreTurnBarrier>;

// Multiplies a block by a tile, in one warpgroup: scores = rows . columns^T.
template <class Traits>
class ScoreProduct {
 public:
  __device__ ScoreProduct(typename Traits::Element* blocks, typename Traits::Element* tiles)
      : blocks_(blocks), tiles_(tiles) {}

  __device__ __forceinline__ auto operator()(int block, int tile, const ScoreTurns& turns) const {
    typename Traits::Mma mma;
    auto thread = mma.get_thread_slice(0);
    const cute::Tensor rows = thread.partition_fragment_A(
        cute::make_tensor(cute::make_smem_ptr(blocks_), typename Traits::Blocks{}));
    const cute::Tensor columns = thread.partition_fragment_B(
        cute::make_tensor(cute::make_smem_ptr(tiles_), typename Traits::Tiles{}));
    cute::Tensor scores =
        cute::partition_fragment_C(mma, Shape<Int<kScoreBlockRows>, Int<kScoreTileRows>>{});
    turns.await();
    start_gemm<true>(mma, rows(cute::_, cute::_, cute::_, uniform(block)),
                     columns(cute::_, cute::_, cute::_, uniform(tile)), scores);
    turns.pass_on();
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    return scores;
  }

 private:
  typename Traits::Element* blocks_;
  typename Traits::Element* tiles_;
};

}  // namespace pbs::cuda::sm90
