// select_blocks, second half: the smallest set of candidates whose mass reaches the threshold, or
// all candidates that reach it by themselves.
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "pbs/bitmask.h"

namespace pbs::cpu {
namespace {

void set_bit(uint32_t* words, int64_t block_idx) {
  words[block_idx / kBitsPerWord] |= 1u << (block_idx % kBitsPerWord);
}

// The permuted key block that holds token 0.
int64_t sink_block(const SelectBlocksParams& params, int64_t b, int64_t hp) {
  if (params.perm == nullptr) return 0;
  const int32_t* perm =
      params.perm + (b * params.problem.num_perm_heads + hp) * params.problem.num_kv;
  const int32_t* end = perm + params.blocking.segment_size;
  const int32_t* found = std::find(perm, end, 0);
  return found == end ? 0 : (found - perm) / params.blocking.kv_block_size;
}

void set_bits(uint32_t* words, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) set_bit(words, j);
}

// The heaviest candidates until their sum, including the masses of the own blocks, reaches the
// threshold.
void set_heaviest(int64_t num_candidates, int64_t num_entries, const float* mass, double threshold,
                  uint32_t* words) {
  double reached = std::accumulate(mass + num_candidates, mass + num_entries, 0.0);
  std::vector<int32_t> order(num_candidates);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [mass](int32_t a, int32_t b) {
    return mass[a] != mass[b] ? mass[a] > mass[b] : a < b;
  });
  for (int64_t i = 0; i < num_candidates && reached < threshold; ++i) {
    set_bit(words, order[i]);
    reached += mass[order[i]];
  }
}

// Selects by mass. With mean scores, the sum includes all candidates, also those of the window.
void set_top(const SelectBlocksParams& params, const QueryBlock& block, const float* mass,
             uint32_t* words) {
  const bool is_sum = params.rule.mass != MassRule::kBlock;
  const int64_t num_own =
      is_sum && counts_own_mass(params.rule)
          ? ceil_div(block.own_end - block.own_begin, params.blocking.kv_block_size)
          : 0;
  const int64_t num_entries = block.num_candidates + num_own;
  // With NaN among the inputs no order is meaningful: visit everything, as dense attention would.
  if (!std::all_of(mass, mass + num_entries, [](float share) { return share >= 0.0f; })) {
    return set_bits(words, 0, block.num_candidates);
  }
  if (is_sum) {
    return set_heaviest(block.num_candidates, num_entries, mass, params.rule.threshold, words);
  }
  const auto least = static_cast<float>(params.rule.threshold);
  for (int64_t j = 0; j < block.num_candidates; ++j) {
    if (mass[j] >= least) set_bit(words, j);
  }
}

}  // namespace

void select_top_mass(const SelectBlocksParams& params, int64_t item_idx, const float* mass) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const SelectItem item = select_item(params, item_idx);
  const QueryBlock block = query_block(item.q_block_idx, problem, blocking, params.is_causal);
  const int64_t num_q_blocks = num_query_blocks(problem, blocking);
  const int64_t num_words = num_mask_words(num_key_blocks(problem, blocking));
  const int64_t row =
      (item.b * problem.num_q_heads + item.first_head) * num_q_blocks + item.q_block_idx;
  uint32_t* words = params.block_mask + row * num_words;
  std::fill_n(words, num_words, 0u);
  if (!needs_mass(params, block)) {
    set_bits(words, 0, block.num_candidates);
  } else {
    set_top(params, block, mass, words);
    set_bit(words, sink_block(params, item.b, item.first_head / heads_per_perm(problem)));
    set_bits(words, num_scored_blocks(block, problem, blocking, params.rule, params.is_causal),
             block.num_candidates);
  }
  int32_t count = 0;
  for (int64_t w = 0; w < num_words; ++w) count += __builtin_popcount(words[w]);
  for (int64_t h = 0; h < heads_per_selection(problem, params.rule); ++h) {
    if (h > 0) std::copy_n(words, num_words, words + h * num_q_blocks * num_words);
    params.counts[row + h * num_q_blocks] = count;
  }
}

}  // namespace pbs::cpu
