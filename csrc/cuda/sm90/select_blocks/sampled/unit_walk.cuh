// What CTAs work on, in which order, and their shared memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include "layout.cuh"
#include "pbs/params.h"
#include "sm90/named_barrier.cuh"
#include "sm90/ring.cuh"
#include "sm90/warpgroup.cuh"

namespace pbs::cuda::sm90 {

struct SampledArgs {
  SelectBlocksParams params;
  SampledPlan plan;
  // Parts of the workspace (SampledWorkspace).
  char* key_tiles;
  char* stacks;
  SampledRow* rows;
  char* tables;
  int* counter;  // of drawn units, without the first of each CTA
  int num_kv;
  int num_candidate_rows;
  int num_q_blocks;
  int num_words;
  bool has_own;  // some keys are nobody's candidates
};

template <int kHeadDim_, int kStacks_>
struct SampledTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStacks = kStacks_;  // of a unit
  static constexpr int kStages = sampled_key_stages(kHeadDim);
  static constexpr int kConsumers = 128 * kSumWarpgroups;
  static constexpr int kOthers = 256;
  static constexpr int kSelectWarps = kOthers / 32 - 1;  // and one that loads
  static constexpr int kThreads = kConsumers + kOthers;
  static constexpr int kOtherRegisters = 64;
  static constexpr int kConsumerRegisters = 88;
  static constexpr int kRegistersAtLaunch = 65536 / kThreads / 8 * 8;
  static_assert(kConsumers * kConsumerRegisters + kOthers * kOtherRegisters <=
                kThreads * kRegistersAtLaunch);
  using Layouts = SampledLayouts<kHeadDim>;
  using Mma = typename Layouts::Mma;
  static constexpr int kTileBytes = key_tile_bytes(kHeadDim);
  static constexpr int kStageBytes =
      static_cast<int>(ceil_div(kTileBytes, kSwizzleBytes)) * kSwizzleBytes;

  struct Shared {
    alignas(kSwizzleBytes) char q[kStacks][stack_bytes(kHeadDim)];
    alignas(kSwizzleBytes) char k[kStages][kStageBytes];
    float totals[kStacks][kSumWarpgroups / kStacks][kStackRows];
    // 1 / (sum of a row), as two equal bfloat16.
    uint32_t weights[kSampledTables][kStacks][kStackRows];
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

// A query block of a selection; its first head.
struct SampledPair {
  int hq;
  int block_idx;
};

// Those of a stack.
struct StackPairs {
  int first;
  int count;  // 0: there is no such stack
};

// What the rows of a stack see.
struct SampledStack {
  int end_of_whole;   // keys before it are candidates of every pair
  int candidate_end;  // keys from it on are candidates of none; 0 where no scores are needed
};

__device__ inline int num_units(const SampledArgs& args) {
  return args.plan.units_per_perm * args.plan.num_perm_heads;
}

__device__ inline QueryBlock block_of(const SampledArgs& args, int block_idx) {
  return query_block(block_idx, args.params.problem, args.params.blocking, args.params.is_causal);
}

__device__ inline int num_scored_blocks(const SampledArgs& args, const QueryBlock& block) {
  const SelectBlocksParams& params = args.params;
  return static_cast<int>(
      num_scored_blocks(block, params.problem, params.blocking, params.rule, params.is_causal));
}

__device__ inline int64_t stack_idx(const SampledArgs& args, int perm_head, int stack) {
  return static_cast<int64_t>(perm_head) * args.plan.stacks_per_perm + stack;
}

__device__ inline StackPairs stack_pairs(const SampledArgs& args, int stack) {
  const int first = stack * args.plan.pairs_per_stack;
  return StackPairs{first,
                    max(0, min(args.plan.pairs_per_stack, args.plan.pairs_per_perm - first))};
}

// One unit: the stacks that a CTA works on at once.
class SampledUnit {
 public:
  __device__ SampledUnit(const SampledArgs& args, int perm_head, int nth)
      : args_(args), perm_head(perm_head), first_stack(nth * args.plan.stacks_per_unit) {
    const Problem& problem = args.params.problem;
    const auto num_perm = static_cast<int>(problem.num_perm_heads);
    b = perm_head / num_perm;
    hp = perm_head % num_perm;
    hkv = hp / (num_perm / static_cast<int>(problem.num_kv_heads));
  }

  __device__ StackPairs pairs(int nth) const { return stack_pairs(args_, first_stack + nth); }

  __device__ SampledStack stack(int nth) const {
    SampledStack stack{};
    const StackPairs found = pairs(nth);
    if (found.count == 0) return stack;
    const QueryBlock first = block_of(args_, pair(found.first).block_idx);
    const QueryBlock last = block_of(args_, pair(found.first + found.count - 1).block_idx);
    const auto kv_block_size = static_cast<int>(args_.params.blocking.kv_block_size);
    stack.end_of_whole = static_cast<int>(first.num_candidates) * kv_block_size;
    if (!is_in_dense_tail(first, args_.params.problem, args_.params.rule, args_.params.is_causal)) {
      stack.candidate_end = static_cast<int>(last.num_candidates) * kv_block_size;
    }
    return stack;
  }

  __device__ SampledPair pair(int idx) const {
    const int selections = args_.plan.selections_per_perm;
    const int heads = static_cast<int>(heads_per_perm(args_.params.problem));
    return SampledPair{hp * heads + idx % selections * (heads / selections), idx / selections};
  }

  __device__ int num_tiles() const {
    int end = 0;
    for (int nth = 0; nth < args_.plan.stacks_per_unit; ++nth)
      end = max(end, stack(nth).candidate_end);
    return (end + kSampledKeys - 1) / kSampledKeys;
  }

 private:
  const SampledArgs& args_;

 public:
  int perm_head;
  int first_stack;
  int b;
  int hp;
  int hkv;
};

// The sampled query of a row of a stack.
struct Sample {
  QueryBlock block;
  int hq;
  int row;  // in the block
  bool exists;
};

__device__ inline Sample sample_of(const SampledArgs& args, const SampledUnit& unit,
                                   const StackPairs& pairs, int row) {
  // Rows of a pair are a power of two, and a division takes twenty instructions.
  const int nth_pair = row >> (31 - __clz(args.plan.rows_per_pair));
  const int nth = row & (args.plan.rows_per_pair - 1);
  Sample sample{};
  if (nth_pair >= pairs.count) return sample;
  const SampledPair pair = unit.pair(pairs.first + nth_pair);
  sample.block = block_of(args, pair.block_idx);
  const auto num_heads =
      static_cast<int>(heads_per_selection(args.params.problem, args.params.rule));
  sample.hq = pair.hq + nth % num_heads;
  const auto num_rows = static_cast<int>(sample.block.num_rows);
  const int count = num_samples_of(num_rows, args.params.rule.num_samples);
  sample.exists = nth < count;
  sample.row = sample.exists ? sample_row(num_rows, count, nth) : 0;
  return sample;
}

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
    shared_.unit_full[ring_.stage()].wait(ring_.parity());
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

// Named barriers of the hardware, from each of these on; 0 is that of all threads. They are more
// than CUTLASS leaves to its users, and it uses none of its own here.
constexpr int kStackBarrier = 1;
constexpr int kTurnBarrier = kStackBarrier + kManyStacks;
constexpr int kTableBarrier = kTurnBarrier + kSumWarpgroups;
static_assert(kTableBarrier + kSampledTables <= 16);

// Whether the sums of a table are there, for selecting warps. They wait long: at a barrier in
// shared memory alone they would wake up whenever any of them changes, and take turns from those
// that multiply. So a named barrier wakes them, after the one that orders what they read.
template <class Traits>
class TableFull {
 public:
  using Shared = typename Traits::Shared;

  __device__ static void arrive(Shared& shared, int table) {
    shared.table_full[table].arrive();
    arrive_barrier(kTableBarrier + table, kThreads);
  }
  __device__ static void wait(Shared& shared, int table, uint32_t parity) {
    sync_barrier(kTableBarrier + table, kThreads);
    shared.table_full[table].wait(parity);
  }

 private:
  static constexpr int kThreads = Traits::kThreads - 32;  // without the warp that loads
};

// The sums of a stack of the unit.
__device__ inline char* table_of(const SampledArgs& args, int table, int stack) {
  const int64_t idx =
      (static_cast<int64_t>(blockIdx.x) * kSampledTables + table) * args.plan.stacks_per_unit +
      stack;
  return args.tables + idx * table_bytes(args.plan);
}

// Draws units from the counter of the grid and loads their keys. By one warp.
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
      const char* from = args_.key_tiles + static_cast<int64_t>(unit.perm_head) *
                                               args_.plan.num_tiles * Traits::kTileBytes;
      const int num_tiles = unit.num_tiles();
      for (int i = 0; i < num_tiles; ++i) load(from + static_cast<int64_t>(i) * Traits::kTileBytes);
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

  __device__ void load(const char* from) {
    shared_.k_empty[key_.stage()].wait(key_.parity() ^ 1);
    if (cute::elect_one_sync()) {
      auto& full = shared_.k_full[key_.stage()];
      full.arrive_and_expect_tx(Traits::kTileBytes);
      cute::SM90_BULK_COPY_G2S::copy(from, reinterpret_cast<uint64_t*>(&full),
                                     shared_.k[key_.stage()], Traits::kTileBytes);
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
