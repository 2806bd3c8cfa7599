// How select_blocks with score="sampled" distributes queries over CTAs on CUDA, and the memory it
// needs, for all GPU families. Host and device.
//
// A pair is a query block and a selection, which belongs to a query head or to all heads that share
// a permutation. The pairs of a permutation are ordered by query block, then by head, so that
// neighbours see the same keys. The sampled queries of several pairs form a stack, the rows of one
// product. A tile of permuted keys is its columns. A unit is several stacks of one permutation. A
// CTA works on one unit after the other.
#pragma once

#include <cstdint>

#include "pbs/params.h"

namespace pbs::cuda {

constexpr int kStackRows = 64;     // sampled queries of a stack: the rows of one warpgroup
constexpr int kSampledKeys = 128;  // keys of a tile: the columns of a product
constexpr int kSumKeys = 32;       // keys of one sum of weights
constexpr int kSumsPerTile = kSampledKeys / kSumKeys;
// Selecting warps read the sums of this many tiles at once, 16 bytes of a row.
constexpr int kTilesPerRead = 2;
constexpr int kSumsPerRead = kTilesPerRead * kSumsPerTile;

// Stacks of a unit. Four share the loaded keys. But on short prompts the longest unit of four takes
// longer than all others together. Then more warps share the work of a stack.
constexpr int kFewestStacks = 1;
constexpr int kFewStacks = 2;
constexpr int kManyStacks = 4;

// What is known of the rows of a stack before the first candidate. Products of their elements times
// `factor` are logarithms to base 2. `offset` shifts them so that the keys of the own segment have
// the total weight `own_sum`, about 1. Each family has its own scale for it.
struct alignas(16) SampledRow {
  float factor;
  float offset;
  float own_sum;
  int32_t candidate_end;  // keys before it are candidates; -1 if the row does not exist
};

// CTAs of sampled queries per multiprocessor. If fewer are needed, up to kMostKeyParts warps share
// the keys of the own segments.
constexpr int kSampleCtasPerSm = 4;
constexpr int kMostKeyParts = 4;

// With at least so many stacks per CTA, the different lengths of units even out.
constexpr int64_t kFewFrom = 2;
constexpr int64_t kManyFrom = 6;

constexpr int64_t kGroupBytes = 24 << 20;  // bytes of keys that are read at about the same time

struct SampledPlan {
  int32_t rows_per_pair;  // rows of a stack: num_samples, rounded up to a power of two
  int32_t pairs_per_stack;
  int32_t stacks_per_unit;  // kFewestStacks, kFewStacks or kManyStacks
  int32_t selections_per_perm;
  int32_t pairs_per_perm;
  int32_t stacks_per_perm;
  int32_t units_per_perm;
  int32_t num_perm_heads;   // over all batches
  int32_t heads_per_group;  // heads whose units are distributed together
  int32_t key_parts;  // parts of the keys of the own segment; one warp sums the weights of a part
  int32_t num_ctas;
  int32_t num_tiles;  // tiles of the candidates of a permutation
  int32_t head_dim;
};

// Facts of a GPU, from its family.
struct SampledMachine {
  int64_t num_sms;
  int64_t ctas_per_sm;
  int64_t most_stacks;  // per unit
  int64_t tile_bytes;   // bytes of a tile of keys, as it is read
};

constexpr SampledPlan sampled_plan(const SelectBlocksParams& params,
                                   const SampledMachine& machine) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const int64_t num_q_blocks = num_query_blocks(problem, blocking);
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  SampledPlan plan{};
  plan.head_dim = narrow(problem.head_dim);
  plan.rows_per_pair = 1;
  while (plan.rows_per_pair < params.rule.num_samples) plan.rows_per_pair *= 2;
  plan.pairs_per_stack = kStackRows / plan.rows_per_pair;
  plan.selections_per_perm =
      narrow(heads_per_perm(problem) / heads_per_selection(problem, params.rule));
  plan.pairs_per_perm = narrow(num_q_blocks * plan.selections_per_perm);
  plan.stacks_per_perm = narrow(ceil_div(plan.pairs_per_perm, plan.pairs_per_stack));
  plan.num_perm_heads = narrow(problem.batch * problem.num_perm_heads);
  const int64_t num_stacks = static_cast<int64_t>(plan.stacks_per_perm) * plan.num_perm_heads;
  plan.key_parts = 1;
  while (plan.key_parts < kMostKeyParts && problem.head_dim <= 128 &&
         2 * plan.key_parts * num_stacks <= kSampleCtasPerSm * machine.num_sms) {
    plan.key_parts *= 2;
  }
  const int64_t ctas_at_once = machine.num_sms * machine.ctas_per_sm;
  const int64_t wanted = num_stacks < kFewFrom * ctas_at_once    ? kFewestStacks
                         : num_stacks < kManyFrom * ctas_at_once ? kFewStacks
                                                                 : kManyStacks;
  plan.stacks_per_unit = narrow(smaller(wanted, machine.most_stacks));
  plan.units_per_perm = narrow(ceil_div(plan.stacks_per_perm, plan.stacks_per_unit));
  plan.num_tiles =
      narrow(ceil_div(num_candidate_rows(problem, blocking, params.is_causal), kSampledKeys));
  const int64_t bytes_per_head = plan.num_tiles * machine.tile_bytes;
  plan.heads_per_group =
      narrow(larger(1, smaller(plan.num_perm_heads, kGroupBytes / larger(1, bytes_per_head))));
  plan.num_ctas = narrow(
      smaller(ctas_at_once, static_cast<int64_t>(plan.units_per_perm) * plan.num_perm_heads));
  return plan;
}

// Parts of the workspace, in this order, each at a multiple of 128 bytes. A family that reads the
// operands directly makes no copies of them.
struct SampledWorkspace {
  int64_t key_tiles = 0;  // (perm heads, num_tiles) copies of tiles of keys
  int64_t stacks;         // (perm heads, stacks_per_perm) copies of stacks
  int64_t rows;           // (perm heads, stacks_per_perm, kStackRows) SampledRow
  int64_t tables;         // (num_ctas, tables_per_cta, stacks_per_unit) of table_bytes
  int64_t counter;        // one int32: the number of drawn units
  int64_t end;
};

// A table has the sums of one stack: (num_tiles / kTilesPerRead, kStackRows, kSumsPerRead)
// bfloat16.
PBS_HOST_DEVICE constexpr int64_t table_bytes(const SampledPlan& plan) {
  return ceil_div(plan.num_tiles, kTilesPerRead) * kStackRows * kSumsPerRead * 2;
}

// Bytes of the copies of a tile and of a stack, and the number of tables of a CTA.
constexpr SampledWorkspace sampled_workspace(const SampledPlan& plan, int64_t key_tile_bytes,
                                             int64_t stack_bytes, int64_t tables_per_cta) {
  constexpr int64_t kAlignment = 128;
  const auto behind = [](int64_t begin, int64_t bytes) {
    return ceil_div(begin + bytes, kAlignment) * kAlignment;
  };
  const int64_t heads = plan.num_perm_heads;
  const int64_t stacks = heads * plan.stacks_per_perm;
  SampledWorkspace at{};
  at.stacks = behind(at.key_tiles, heads * plan.num_tiles * key_tile_bytes);
  at.rows = behind(at.stacks, stacks * stack_bytes);
  at.tables = behind(at.rows, stacks * kStackRows * static_cast<int64_t>(sizeof(SampledRow)));
  at.counter =
      behind(at.tables, plan.num_ctas * tables_per_cta * plan.stacks_per_unit * table_bytes(plan));
  at.end = behind(at.counter, sizeof(int32_t));
  return at;
}

}  // namespace pbs::cuda
