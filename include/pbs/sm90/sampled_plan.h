// How select_blocks with score="sampled" deals out queries on CUDA, and the memory it takes. Host
// and device.
//
// A pair is a query block and a selection: that of a query head, or of all that share a
// permutation. The pairs of a permutation follow each other by query block, then by head, so that
// neighbours see the same keys. The sampled queries of some pairs are stacked to the rows of one
// product, a tile of permuted keys is its columns. A CTA works on one unit after the other,
// some stacks of one permutation.
#pragma once

#include <cstdint>

#include "pbs/params.h"
#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

constexpr int kStackRows = 64;     // sampled queries of a stack, one warpgroup's rows
constexpr int kSampledKeys = 128;  // of a tile, the columns of a product
constexpr int kSumKeys = 32;       // of one sum of weights
constexpr int kSumsPerTile = kSampledKeys / kSumKeys;
// Selecting warps read the sums of so many tiles at once, 16 bytes of a row.
constexpr int kTilesPerRead = 2;
constexpr int kSumsPerRead = kTilesPerRead * kSumsPerTile;

constexpr int kDrawnUnits = 3;     // by a CTA, at once
constexpr int kSampledTables = 2;  // of sums: one is filled while the other is read
constexpr int kSumWarpgroups = 4;  // that multiply
// Stacks of a unit. Four share the keys that are loaded; but on short prompts the longest unit of
// four takes longer than all others together. Then two or four warpgroups share the work of a
// stack.
constexpr int kFewestStacks = 1;
constexpr int kFewStacks = 2;
constexpr int kManyStacks = 4;

// Tiles of keys in flight.
PBS_HOST_DEVICE constexpr int sampled_key_stages(int head_dim) {
  return head_dim_tiles(head_dim).sampled_stages;
}

// A tile in device memory is the image of what shared memory holds: its elements of one byte,
// swizzled, and a float behind them that they are multiples of. Bulk copies move 16 bytes at least.
PBS_HOST_DEVICE constexpr int key_tile_bytes(int head_dim) { return kSampledKeys * head_dim + 16; }
PBS_HOST_DEVICE constexpr int stack_bytes(int head_dim) { return kStackRows * head_dim; }

// What the rows of a stack know before they meet a candidate. Products of their elements of one
// byte times `factor` are logarithms to base 2. `offset`, which half precision holds, shifts them
// so that the keys of the own segment weigh `own_sum` together, about 1
// (csrc/cuda/sm90/select_blocks/sampled/weights.cuh).
struct alignas(16) SampledRow {
  float factor;
  float offset;
  float own_sum;
  int32_t candidate_end;  // keys before it are candidates; -1 where there is no such row
};

// CTAs of sampled queries at once on a multiprocessor. Where fewer are needed, more warps share the
// keys of the own segments, up to kMostKeyParts.
constexpr int kSampleCtasPerSm = 4;
constexpr int kMostKeyParts = 4;

// Stacks a CTA from which on the lengths of units of few and of many even out.
constexpr int64_t kFewFrom = 2;
constexpr int64_t kManyFrom = 6;

constexpr int64_t kGroupBytes = 24 << 20;  // of keys that are read at about the same time

struct SampledPlan {
  int32_t rows_per_pair;  // of a stack: num_samples, filled up to a power of two
  int32_t pairs_per_stack;
  int32_t stacks_per_unit;  // kFewestStacks, kFewStacks or kManyStacks
  int32_t selections_per_perm;
  int32_t pairs_per_perm;
  int32_t stacks_per_perm;
  int32_t units_per_perm;
  int32_t num_perm_heads;   // of all batches
  int32_t heads_per_group;  // whose units are dealt out together
  int32_t key_parts;        // of the own segment's keys, that warps share to find what they weigh
  int32_t num_ctas;
  int32_t num_tiles;  // of the candidates of a permutation
  int32_t head_dim;
};

constexpr SampledPlan sampled_plan(const SelectBlocksParams& params, int64_t num_sms) {
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
         2 * plan.key_parts * num_stacks <= kSampleCtasPerSm * num_sms) {
    plan.key_parts *= 2;
  }
  plan.stacks_per_unit = num_stacks < kFewFrom * num_sms    ? kFewestStacks
                         : num_stacks < kManyFrom * num_sms ? kFewStacks
                                                            : kManyStacks;
  plan.units_per_perm = narrow(ceil_div(plan.stacks_per_perm, plan.stacks_per_unit));
  plan.num_tiles =
      narrow(ceil_div(num_candidate_rows(problem, blocking, params.is_causal), kSampledKeys));
  const int64_t bytes_per_head =
      static_cast<int64_t>(plan.num_tiles) * key_tile_bytes(plan.head_dim);
  plan.heads_per_group =
      narrow(larger(1, smaller(plan.num_perm_heads, kGroupBytes / larger(1, bytes_per_head))));
  plan.num_ctas =
      narrow(smaller(num_sms, static_cast<int64_t>(plan.units_per_perm) * plan.num_perm_heads));
  return plan;
}

// Parts of the workspace, in this order, each at a multiple of 128 bytes.
struct SampledWorkspace {
  int64_t key_tiles = 0;  // (perm heads, num_tiles) of key_tile_bytes
  int64_t stacks;         // (perm heads, stacks_per_perm) of stack_bytes
  int64_t rows;           // (perm heads, stacks_per_perm, kStackRows) SampledRow
  int64_t tables;         // (num_ctas, kSampledTables, stacks_per_unit) of table_bytes
  int64_t counter;        // one int32: units drawn
  int64_t end;
};

// A table holds one stack's sums: (num_tiles / kTilesPerRead, kStackRows, kSumsPerRead) bfloat16.
PBS_HOST_DEVICE constexpr int64_t table_bytes(const SampledPlan& plan) {
  return ceil_div(plan.num_tiles, kTilesPerRead) * kStackRows * kSumsPerRead * 2;
}

constexpr SampledWorkspace sampled_workspace(const SampledPlan& plan) {
  constexpr int64_t kAlignment = 128;
  const auto behind = [](int64_t begin, int64_t bytes) {
    return ceil_div(begin + bytes, kAlignment) * kAlignment;
  };
  const int64_t heads = plan.num_perm_heads;
  const int64_t stacks = heads * plan.stacks_per_perm;
  SampledWorkspace at{};
  at.stacks = behind(at.key_tiles, heads * plan.num_tiles * key_tile_bytes(plan.head_dim));
  at.rows = behind(at.stacks, stacks * stack_bytes(plan.head_dim));
  at.tables = behind(at.rows, stacks * kStackRows * static_cast<int64_t>(sizeof(SampledRow)));
  at.counter = behind(at.tables, static_cast<int64_t>(plan.num_ctas) * kSampledTables *
                                     plan.stacks_per_unit * table_bytes(plan));
  at.end = behind(at.counter, sizeof(int32_t));
  return at;
}

}  // namespace pbs::cuda::sm90
