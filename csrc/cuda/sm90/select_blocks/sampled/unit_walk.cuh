// What the CTAs of select_blocks with score="sampled" work on, in which order, and their shared
// memory.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include "pbs/params.h"
#include "pbs/sm90/sampled_plan.h"
#include "pbs/sm90/select_tiles.h"
#include "sm90/ring.cuh"
#include "sm90/tma.cuh"
#include "sm90/warpgroup.cuh"

namespace pbs::cuda::sm90 {

struct SampledArgs {
  SelectBlocksParams params;
  SampledPlan plan;
  char* tables;   // (num_ctas, kSampledTables, warpgroups) of table_bytes
  float* masses;  // (num_ctas, kSelectWarps, mass_stride)
  int* counter;   // of drawn units, without the first of each CTA
  int num_q_blocks;
  int num_words;
  CUtensorMap k;
  CUtensorMap k_perm;
};

template <class Element_, int kHeadDim_>
struct SampledTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStages = sampled_key_stages(kHeadDim);
  static constexpr int kConsumers = 128 * kSampledWarpgroups;
  static constexpr int kThreads = kConsumers + 32 * (1 + kSelectWarps);  // one loads
  // 128 a thread are there at launch (65536 / 512).
  static constexpr int kOtherRegisters = 88;
  static constexpr int kConsumerRegisters = 168;
  static_assert(kThreads == 512 && kOtherRegisters + kConsumerRegisters == 256);
  static constexpr int kGroupColumns = group_columns(kHeadDim);
  using Rows = cute::Int<kStackRows>;
  using Keys = cute::Int<kSampledTileKeys>;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<Rows, Keys, cute::Int<kHeadDim>>>()));
  template <class NumRows>
  using Atom =
      decltype(cutlass::gemm::collective::detail::ss_smem_selector<cute::GMMA::Major::K, Element,
                                                                   NumRows, cute::Int<kHeadDim>>());
  using LayoutQ = decltype(cute::tile_to_shape(
      Atom<Rows>{}, cute::Shape<Rows, cute::Int<kHeadDim>, cute::Int<kSampledWarpgroups>>{}));
  using LayoutK = decltype(cute::tile_to_shape(
      Atom<Keys>{}, cute::Shape<Keys, cute::Int<kHeadDim>, cute::Int<kStages>>{}));

  struct Shared {
    alignas(kSwizzleBytes) Element q[kSampledWarpgroups * kStackRows * kHeadDim];
    alignas(kSwizzleBytes) Element k[kStages * kSampledTileKeys * kHeadDim];
    float weights[kSampledTables][kSampledWarpgroups][kStackRows];  // 1 / (sum of a row)
    uint32_t scratch[kSelectWarps][kCutScratch];
    int units[kDrawnUnits];
    cutlass::arch::ClusterTransactionBarrier k_full[kStages];
    cutlass::arch::ClusterBarrier k_empty[kStages];
    cutlass::arch::ClusterBarrier unit_full[kDrawnUnits];
    cutlass::arch::ClusterBarrier unit_empty[kDrawnUnits];
    cutlass::arch::ClusterBarrier table_full[kSampledTables];
    cutlass::arch::ClusterBarrier table_empty[kSampledTables];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + kSwizzleBytes;
  static_assert(kSharedBytes <= kSharedBytesPerCta);
};

// Keys, from `begin` on.
struct KeyRange {
  int begin = 0;
  int end = 0;

  __device__ bool is_empty() const { return begin >= end; }
};

// Which of the tiles that follow each other from `begin` on a range lies in.
struct TileRange {
  int first;
  int end;

  __device__ TileRange(const KeyRange& keys, int begin)
      : first((keys.begin - begin) / kSampledTileKeys),
        end(keys.is_empty() ? first
                            : (keys.end - begin + kSampledTileKeys - 1) / kSampledTileKeys) {}
};

// A query block of a head.
struct SampledPair {
  int hq;
  int block_idx;
};

// Sampled queries of some pairs.
struct SampledStack {
  int first_pair;
  int num_pairs;         // 0: there is none
  KeyRange own;          // of all its rows
  int lowest_candidate;  // the first key that is no candidate of some row
  int candidate_end;
};

__device__ inline int num_units(const SampledArgs& args) {
  return args.plan.units_per_perm * args.plan.num_perm_heads;
}

__device__ inline QueryBlock block_of(const SampledArgs& args, int block_idx) {
  return query_block(block_idx, args.params.problem, args.params.blocking, args.params.is_causal);
}

// One unit: the stacks that the warpgroups of a CTA work on at once.
class SampledUnit {
 public:
  __device__ SampledUnit(const SampledArgs& args, int perm_head, int nth)
      : args_(args), first_pair_(nth * kSampledWarpgroups * args.plan.pairs_per_stack) {
    const Problem& problem = args.params.problem;
    const auto num_perm = static_cast<int>(problem.num_perm_heads);
    b = perm_head / num_perm;
    hp = perm_head % num_perm;
    hkv = hp / (num_perm / static_cast<int>(problem.num_kv_heads));
    const SampledStack all = stack_of(first_pair_, kSampledWarpgroups * args.plan.pairs_per_stack);
    own = all.own;
    candidate_end = all.candidate_end;
  }

  __device__ SampledStack stack(int nth) const {
    const int pairs_per_stack = args_.plan.pairs_per_stack;
    return stack_of(first_pair_ + nth * pairs_per_stack, pairs_per_stack);
  }
  __device__ SampledPair pair(int idx) const {
    const int heads = args_.plan.heads_per_perm;
    return SampledPair{hp * heads + idx % heads, idx / heads};
  }

  int b;
  int hp;
  int hkv;
  KeyRange own;  // of all its rows
  int candidate_end;

  __device__ int num_own_tiles() const { return TileRange(own, own.begin).end; }
  __device__ int num_candidate_tiles() const {
    return TileRange(KeyRange{0, candidate_end}, 0).end;
  }
  __device__ int num_tiles() const { return num_own_tiles() + num_candidate_tiles(); }

 private:
  __device__ SampledStack stack_of(int first_pair, int most_pairs) const {
    SampledStack stack{};
    stack.first_pair = first_pair;
    stack.num_pairs = max(0, min(most_pairs, args_.plan.pairs_per_perm - first_pair));
    if (stack.num_pairs == 0) return stack;
    const QueryBlock first = block_of(args_, pair(first_pair).block_idx);
    const QueryBlock last = block_of(args_, pair(first_pair + stack.num_pairs - 1).block_idx);
    if (counts_own_mass(args_.params.rule)) {
      stack.own = KeyRange{static_cast<int>(first.own_begin), static_cast<int>(last.own_end)};
    }
    const auto kv_block_size = static_cast<int>(args_.params.blocking.kv_block_size);
    stack.lowest_candidate = static_cast<int>(first.num_candidates) * kv_block_size;
    stack.candidate_end = static_cast<int>(last.num_candidates) * kv_block_size;
    return stack;
  }

  const SampledArgs& args_;
  int first_pair_;
};

// Units are numbered by groups of heads, so that all CTAs read keys that stay in L2, and in a group
// from the longest to the shortest.
__device__ inline SampledUnit unit_of(const SampledArgs& args, int idx) {
  const SampledPlan& plan = args.plan;
  const int per_group = plan.units_per_perm * plan.heads_per_group;
  const int first_head = idx / per_group * plan.heads_per_group;
  const int num_heads = min(plan.heads_per_group, plan.num_perm_heads - first_head);
  const int from_longest = idx % per_group / num_heads;
  return SampledUnit(args, first_head + idx % per_group % num_heads,
                     plan.units_per_perm - 1 - from_longest);
}

// The units of a CTA, one after the other, as its loader draws them; for everybody else.
template <class Traits>
class DrawnUnits {
 public:
  __device__ DrawnUnits(const SampledArgs& args, typename Traits::Shared& shared)
      : args_(args), shared_(shared) {}

  // Whether there is one more.
  __device__ bool next() {
    ++nth_;
    auto& full = shared_.unit_full[ring_.stage()];
    // Selecting warps wait long, and would take turns from those that multiply.
    while (!full.try_wait(ring_.parity())) __nanosleep(64);
    idx_ = shared_.units[ring_.stage()];
    shared_.unit_empty[ring_.stage()].arrive();
    ring_.advance();
    return idx_ < num_units(args_);
  }
  __device__ SampledUnit unit() const { return unit_of(args_, idx_); }
  __device__ int table() const { return nth_ % kSampledTables; }
  __device__ uint32_t parity() const { return nth_ / kSampledTables & 1; }

 private:
  const SampledArgs& args_;
  typename Traits::Shared& shared_;
  RingState<kDrawnUnits> ring_;
  int nth_ = -1;
  int idx_ = 0;
};

// The sums of a stack: its own keys' tiles, and behind them its candidates'.
__device__ inline char* table_of(const SampledArgs& args, int table, int warpgroup) {
  const int64_t idx =
      (static_cast<int64_t>(blockIdx.x) * kSampledTables + table) * kSampledWarpgroups + warpgroup;
  return args.tables + idx * table_bytes(args.plan);
}

// Draws units from the counter of the grid and loads their keys, in the order in which they are
// multiplied. By one warp.
template <class Traits>
class SampledLoader {
 public:
  using Shared = typename Traits::Shared;

  __device__ SampledLoader(const SampledArgs& args, Shared& shared)
      : args_(args), shared_(shared) {}

  __device__ void run() {
    for (int idx = static_cast<int>(blockIdx.x);; idx = draw()) {
      publish(idx);
      if (idx >= num_units(args_)) return;
      const SampledUnit unit = unit_of(args_, idx);
      for (int i = 0; i < unit.num_own_tiles(); ++i) {
        load(args_.k, unit.own.begin + i * kSampledTileKeys, unit.hkv, unit.b);
      }
      for (int i = 0; i < unit.num_candidate_tiles(); ++i) {
        load(args_.k_perm, i * kSampledTileKeys, unit.hp, unit.b);
      }
    }
  }

 private:
  // The first ones are the CTAs' own.
  __device__ int draw() const {
    int drawn = 0;
    if (threadIdx.x % 32 == 0) drawn = atomicAdd(args_.counter, 1);
    return static_cast<int>(gridDim.x) + uniform(drawn);
  }

  __device__ void publish(int idx) {
    shared_.unit_empty[unit_.stage()].wait(unit_.parity() ^ 1);
    if (threadIdx.x % 32 == 0) {
      shared_.units[unit_.stage()] = idx;
      shared_.unit_full[unit_.stage()].arrive();
    }
    __syncwarp();
    unit_.advance();
  }

  __device__ void load(const CUtensorMap& map, int row, int head, int b) {
    constexpr int kTileSize = kSampledTileKeys * Traits::kHeadDim;
    shared_.k_empty[key_.stage()].wait(key_.parity() ^ 1);
    if (cute::elect_one_sync()) {
      auto& full = shared_.k_full[key_.stage()];
      full.arrive_and_expect_tx(2 * kTileSize);
      copy_box(map, full, shared_.k + key_.stage() * kTileSize, row, 0, head, b);
    }
    __syncwarp();
    key_.advance();
  }

  const SampledArgs& args_;
  Shared& shared_;
  RingState<kDrawnUnits> unit_;
  RingState<Traits::kStages> key_;
};

}  // namespace pbs::cuda::sm90
