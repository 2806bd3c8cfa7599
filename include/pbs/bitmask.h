// The block mask: bit j % 32 of word j / 32 is set if key block j is selected.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs {

constexpr int64_t kBitsPerWord = 32;

PBS_HOST_DEVICE constexpr int64_t num_mask_words(int64_t num_kv_blocks) {
  return ceil_div(num_kv_blocks, kBitsPerWord);
}

// Word `word_idx` without the bits from num_candidates on, which a mask from the caller may
// contain.
PBS_HOST_DEVICE constexpr uint32_t candidate_bits(uint32_t word, int64_t word_idx,
                                                  int64_t num_candidates) {
  const int64_t num_left = num_candidates - word_idx * kBitsPerWord;
  if (num_left <= 0) return 0;
  return num_left >= kBitsPerWord ? word : word & ((1u << num_left) - 1u);
}

// Calls visit(block_idx) for every selected candidate, in ascending order.
template <class Visit>
inline void for_each_selected(const uint32_t* words, int64_t num_candidates, Visit&& visit) {
  for (int64_t word_idx = 0; word_idx * kBitsPerWord < num_candidates; ++word_idx) {
    uint32_t bits = candidate_bits(words[word_idx], word_idx, num_candidates);
    for (; bits != 0; bits &= bits - 1) visit(word_idx * kBitsPerWord + __builtin_ctz(bits));
  }
}

}  // namespace pbs
