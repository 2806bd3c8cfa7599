// How the CTAs of score_keys walk over tiles of keys and of queries: one producer warp loads them
// by TMA, two warpgroups multiply them and hand each product to a pass.
#pragma once

#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include <cute/arch/cluster_sm90.hpp>

#include "../ring.cuh"
#include "../tma.cuh"
#include "../warpgroup.cuh"
#include "pbs/params.h"
#include "pbs/score_parts.h"

namespace pbs::cuda {

using cute::Int;
using cute::Shape;

struct ScoreArgs {
  ScoreKeysParams params;
  ScoreParts parts;
  float2* state;   // (B, Hq, num_parts, kScoreRows): maximum and sum of each query's weights
  int num_merged;  // parts that the second pass has to merge
  int num_rows;
  int num_scored;
  CUtensorMap q;
  CUtensorMap k;
};

constexpr int kScorePairs = 2;  // of warpgroups
constexpr int kScorePairThreads = 256;
constexpr int kScoreConsumers = kScorePairs * kScorePairThreads;
constexpr int kScoreThreads = kScoreConsumers + 128;  // the producer, in a warpgroup of its own

__device__ inline int score_pair() { return static_cast<int>(threadIdx.x) / kScorePairThreads; }

template <class Element_, int kHeadDim_>
struct ScoreTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileSize = kScoreRows * kHeadDim;
  static constexpr int kQStages = score_q_stages(kHeadDim);
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 Shape<Int<kScoreRows>, Int<kScoreKeys>, Int<kHeadDim>>>(),
      cute::Layout<Shape<cute::_2, cute::_1, cute::_1>>{}));
  using Atom = decltype(cutlass::gemm::collective::detail::ss_smem_selector<
                        cute::GMMA::Major::K, Element, Int<kScoreRows>, Int<kHeadDim>>());
  // The last dimension counts tiles, of which there are as many as the launch made room for.
  using Layout = decltype(cute::tile_to_shape(
      Atom{}, Shape<Int<kScoreRows>, Int<kHeadDim>, Int<kMaxScoreTilesPerChunk>>{}));
};

struct ScoreBarriers {
  cutlass::arch::ClusterTransactionBarrier q_full[2];
  cutlass::arch::ClusterTransactionBarrier k_full[kMaxScoreTilesPerChunk];
  cutlass::arch::ClusterBarrier q_empty[2];
  cutlass::arch::ClusterBarrier k_empty[kMaxScoreTilesPerChunk];
};
static_assert(sizeof(ScoreBarriers) <= kScoreBarrierBytes);

// What a CTA works on, and its shared memory.
template <class Traits>
struct ScorePart {
  using Element = typename Traits::Element;

  __device__ ScorePart(const ScoreArgs& args, char* raw)
      : tiles_per_chunk(args.parts.tiles_per_chunk) {
    const Problem& problem = args.params.problem;
    const int num_kv_heads = static_cast<int>(problem.num_kv_heads);
    const int head = static_cast<int>(blockIdx.x) / args.parts.num_parts;
    idx = static_cast<int>(blockIdx.x) % args.parts.num_parts;
    b = head / num_kv_heads;
    kv_head = head % num_kv_heads;
    heads_per_kv = static_cast<int>(problem.num_q_heads) / num_kv_heads;
    first_tile = idx * args.parts.tiles_per_part;
    const int end = (args.num_scored + kScoreKeys - 1) / kScoreKeys;
    num_tiles = min(args.parts.tiles_per_part, end - first_tile);
    num_chunks = (num_tiles + tiles_per_chunk - 1) / tiles_per_chunk;
    // By an offset: the compiler then knows that all of this is shared memory.
    const uint32_t misplaced = cute::cast_smem_ptr_to_uint(raw) % kSwizzleBytes;
    queries = reinterpret_cast<Element*>(raw + (misplaced == 0 ? 0 : kSwizzleBytes - misplaced));
    keys = queries + Traits::kQStages * Traits::kTileSize;
    head_table = reinterpret_cast<float2*>(keys + tiles_per_chunk * Traits::kTileSize);
    tile_table = reinterpret_cast<float*>(head_table + heads_per_kv * kScorePairs * kScoreRows);
    barriers = reinterpret_cast<ScoreBarriers*>(tile_table + tiles_per_chunk * kScoreKeys);
  }

  __device__ int tiles_in_chunk(int chunk) const {
    return min(tiles_per_chunk, num_tiles - chunk * tiles_per_chunk);
  }

  int idx;  // among the parts of its key head
  int b;
  int kv_head;
  int heads_per_kv;
  int first_tile;
  int num_tiles;
  int tiles_per_chunk;
  int num_chunks;
  Element* queries;    // kQStages tiles
  Element* keys;       // tiles_per_chunk tiles
  float2* head_table;  // (heads_per_kv, kScorePairs, kScoreRows)
  float* tile_table;   // (tiles_per_chunk, kScoreKeys)
  ScoreBarriers* barriers;
};

// Loads what the products read, in their order. By one warp.
template <class Traits>
__device__ void load_operands(const ScoreArgs& args, const ScorePart<Traits>& part) {
  constexpr int kBytes = score_tile_bytes(Traits::kHeadDim);
  ScoreBarriers& barriers = *part.barriers;
  RingState<Traits::kQStages> q;
  for (int chunk = 0; chunk < part.num_chunks; ++chunk) {
    for (int head = 0; head < part.heads_per_kv; ++head) {
      barriers.q_empty[q.stage()].wait(q.parity() ^ 1);
      if (cute::elect_one_sync()) {
        auto& full = barriers.q_full[q.stage()];
        full.arrive_and_expect_tx(kBytes);
        copy_box(args.q, full, part.queries + q.stage() * Traits::kTileSize, 0, 0,
                 part.kv_head * part.heads_per_kv + head, part.b);
      }
      __syncwarp();
      q.advance();
      if (head > 0) continue;
      for (int tile = 0; tile < part.tiles_in_chunk(chunk); ++tile) {
        barriers.k_empty[tile].wait((chunk & 1) ^ 1);
        if (cute::elect_one_sync()) {
          barriers.k_full[tile].arrive_and_expect_tx(kBytes);
          const int row = (part.first_tile + chunk * part.tiles_per_chunk + tile) * kScoreKeys;
          copy_box(args.k, barriers.k_full[tile], part.keys + tile * Traits::kTileSize, row, 0,
                   part.kv_head, part.b);
        }
        __syncwarp();
      }
    }
  }
}

// Which product it is.
struct ScoreStep {
  int chunk;
  int head;
  int tile;  // in the chunk
};

// Whether x is true in any thread of a warpgroup, by all of them.
__device__ inline bool any_in_warpgroup(bool x) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, one;\n"
      "setp.ne.s32 mine, %1, 0;\n"
      "barrier.cta.red.or.pred one, %2, 128, mine;\n"
      "selp.s32 %0, 1, 0, one;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<int>(x)), "r"(1 + static_cast<int>(threadIdx.x) / 128)
      : "memory");
  return any != 0;
}

// Multiplies the queries of each head by the keys of each tile. Two pairs of warpgroups share the
// tiles of a chunk; four warpgroups in all, so that the tensor cores are busy while the others turn
// products into weights. With keys as rows, a warpgroup has 64 keys and all queries; otherwise 64
// queries and all keys.
template <bool kKeysAreRows, class Traits, class Pass>
__device__ void consume_products(const ScorePart<Traits>& part, Pass& pass) {
  ScoreBarriers& barriers = *part.barriers;
  const cute::Tensor sQ =
      cute::make_tensor(cute::make_smem_ptr(part.queries), typename Traits::Layout{});
  const cute::Tensor sK =
      cute::make_tensor(cute::make_smem_ptr(part.keys), typename Traits::Layout{});
  typename Traits::Mma mma;
  const int pair = score_pair();
  auto thread = mma.get_thread_slice(128 * uniform(static_cast<int>(threadIdx.x) / 128 % 2));
  const cute::Tensor rows = thread.partition_fragment_A(kKeysAreRows ? sK : sQ);
  const cute::Tensor columns = thread.partition_fragment_B(kKeysAreRows ? sQ : sK);
  cute::Tensor scores = cute::partition_fragment_C(mma, Shape<Int<kScoreRows>, Int<kScoreKeys>>{});
  RingState<Traits::kQStages> q;
  for (int chunk = 0; chunk < part.num_chunks; ++chunk) {
    const int num_tiles = part.tiles_in_chunk(chunk);
    for (int head = 0; head < part.heads_per_kv; ++head) {
      barriers.q_full[q.stage()].wait(q.parity());
      pass.begin_head(chunk, head);
      do {
        for (int tile = pair; tile < num_tiles; tile += kScorePairs) {
          barriers.k_full[tile].wait(chunk & 1);
          start_gemm<true>(
              mma, rows(cute::_, cute::_, cute::_, uniform(kKeysAreRows ? tile : q.stage())),
              columns(cute::_, cute::_, cute::_, uniform(kKeysAreRows ? q.stage() : tile)), scores);
          cute::warpgroup_wait<0>();
          cute::warpgroup_fence_operand(scores);
          pass.take(scores, ScoreStep{chunk, head, tile});
        }
      } while (pass.repeats());
      release(barriers.q_empty[q.stage()]);
      if (head == part.heads_per_kv - 1) {
        for (int tile = pair; tile < num_tiles; tile += kScorePairs) {
          release(barriers.k_empty[tile]);
        }
      }
      pass.end_head(head);
      q.advance();
    }
  }
}

}  // namespace pbs::cuda
