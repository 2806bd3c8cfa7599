// select_blocks, second half: the smallest set of candidates whose mass reaches the threshold, or
// all that reach it by themselves.
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

void set_top(const SelectBlocksParams& params, int64_t num_candidates, int64_t num_entries,
             const float* mass, uint32_t* words) {
  // With a NaN among the inputs no order means anything: visit everything, as dense would.
  const bool is_ordered =
      std::all_of(mass, mass + num_entries, [](float share) { return share >= 0.0f; });
  const double threshold = params.rule.threshold;
  const bool takes_all = !is_ordered || threshold >= 1.0;
  if (takes_all || params.rule.mass == MassRule::kBlock) {
    const auto least = static_cast<float>(threshold);
    for (int64_t j = 0; j < num_candidates; ++j) {
      if (takes_all || mass[j] >= least) set_bit(words, j);
    }
    return;
  }
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

}  // namespace

void select_top_mass(const SelectBlocksParams& params, int64_t item, const float* mass) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const int64_t num_q_blocks = num_query_blocks(problem, blocking);
  const int64_t hq = item / num_q_blocks % problem.num_q_heads;
  const int64_t b = item / num_q_blocks / problem.num_q_heads;
  const QueryBlock block = query_block(item % num_q_blocks, problem, blocking, params.is_causal);
  const int64_t num_words = num_mask_words(num_key_blocks(problem, blocking));
  uint32_t* words = params.block_mask + item * num_words;
  std::fill_n(words, num_words, 0u);
  if (block.num_candidates > 0) {
    const int64_t num_own = counts_own_mass(params.rule)
                                ? ceil_div(block.own_end - block.own_begin, blocking.kv_block_size)
                                : 0;
    set_top(params, block.num_candidates, block.num_candidates + num_own, mass, words);
    set_bit(words, sink_block(params, b, hq / heads_per_perm(problem)));
  }
  int32_t count = 0;
  for (int64_t w = 0; w < num_words; ++w) count += __builtin_popcount(words[w]);
  params.counts[item] = count;
}

}  // namespace pbs::cpu
