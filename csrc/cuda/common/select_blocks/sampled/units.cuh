// The work units of the CTAs of sampled scores, and their order.
#pragma once

#include <limits>

#include "pbs/bitmask.h"
#include "pbs/params.h"
#include "pbs/sampled_plan.h"

namespace pbs::cuda {

struct SampledArgs {
  SelectBlocksParams params;
  SampledPlan plan;
  // Parts of the workspace (SampledWorkspace).
  char* key_tiles;  // empty if the family makes no copies
  char* stacks;     // the same
  SampledRow* rows;
  char* tables;
  int* counter;  // drawn units, without the first unit of each CTA
  float factor;  // scale * log2(e)
  int num_kv;
  int num_candidate_rows;
  int num_q_blocks;
  int num_words;
  bool has_own;  // whether some keys are candidates of no query
};

inline SampledArgs sampled_args(const SelectBlocksParams& params, const SampledPlan& plan,
                                const SampledWorkspace& at, void* workspace) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  char* memory = static_cast<char*>(workspace);
  SampledArgs args{};
  args.params = params;
  args.plan = plan;
  args.key_tiles = memory + at.key_tiles;
  args.stacks = memory + at.stacks;
  args.rows = reinterpret_cast<SampledRow*>(memory + at.rows);
  args.tables = memory + at.tables;
  args.counter = reinterpret_cast<int*>(memory + at.counter);
  args.factor = params.scale * kLog2e;
  args.num_kv = static_cast<int>(problem.num_kv);
  args.num_candidate_rows =
      static_cast<int>(num_candidate_rows(problem, blocking, params.is_causal));
  args.num_q_blocks = static_cast<int>(num_query_blocks(problem, blocking));
  args.num_words = static_cast<int>(num_mask_words(num_key_blocks(problem, blocking)));
  args.has_own = params.is_causal || problem.num_kv % blocking.segment_size != 0;
  return args;
}

inline bool exceeds_grid(const SampledPlan& plan) {
  const int64_t most_per_head = larger(plan.stacks_per_perm, plan.num_tiles);
  return most_per_head * plan.num_perm_heads > std::numeric_limits<int32_t>::max();
}

// A query block of a selection, and its first head.
struct SampledPair {
  int hq;
  int block_idx;
};

// The pairs of a stack.
struct StackPairs {
  int first;
  int count;  // 0: the stack does not exist
};

// The keys that the rows of a stack see.
struct SampledStack {
  int end_of_whole;   // keys before it are candidates of every pair
  int candidate_end;  // keys from it on are candidates of no pair; 0 if no scores are needed
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
  // The number of rows per pair is a power of two. A division takes twenty instructions.
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

// Units are ordered by groups of heads, so that all CTAs read keys that stay in L2. Inside a group,
// the longest unit comes first.
__device__ inline SampledUnit unit_of(const SampledArgs& args, int idx) {
  const SampledPlan& plan = args.plan;
  const int per_group = plan.units_per_perm * plan.heads_per_group;
  const int first_head = idx / per_group * plan.heads_per_group;
  const int num_heads = min(plan.heads_per_group, plan.num_perm_heads - first_head);
  const int from_longest = idx % per_group / num_heads;
  return SampledUnit(args, first_head + idx % per_group % num_heads,
                     plan.units_per_perm - 1 - from_longest);
}

}  // namespace pbs::cuda
