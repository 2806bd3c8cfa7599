// Which keys a block of queries may visit: index arithmetic that all backends share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PBS_HOST_DEVICE __host__ __device__
#else
#define PBS_HOST_DEVICE
#endif

namespace pbs {

PBS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PBS_HOST_DEVICE constexpr int64_t round_down(int64_t a, int64_t b) { return a / b * b; }
PBS_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PBS_HOST_DEVICE constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// The keys that one block of queries visits: the selected ones among permuted key blocks [0,
// num_candidates), and original keys [own_begin, own_end). With causal attention, the row at
// position p sees keys up to p. The own range starts at a segment boundary, so no candidate needs a
// mask.
struct QueryBlock {
  int64_t first_row;       // query row
  int64_t num_rows;        // fewer than block_size in the last block
  int64_t first_position;  // position of first_row among the keys (bottom-right alignment)
  int64_t own_begin;       // key row
  int64_t own_end;         // key row, after the last one that any row of the block sees
  int64_t num_candidates;  // permuted key blocks
};

// There are fewer than 2^31 rows (check_num_keys), and a GPU divides 32 bits several times faster.
PBS_HOST_DEVICE constexpr QueryBlock query_block(int64_t q_block_idx, int64_t num_q, int64_t num_kv,
                                                 int64_t block_size, int64_t kv_block_size,
                                                 int64_t segment_size, bool is_causal) {
  QueryBlock block{};
  block.first_row = q_block_idx * block_size;
  block.num_rows = smaller(block_size, num_q - block.first_row);
  block.first_position = num_kv - num_q + block.first_row;
  const auto own_from = static_cast<uint32_t>(is_causal ? block.first_position : num_kv);
  const uint32_t own_begin = own_from - own_from % static_cast<uint32_t>(segment_size);
  block.own_begin = own_begin;
  block.own_end = is_causal ? block.first_position + block.num_rows : num_kv;
  block.num_candidates = own_begin / static_cast<uint32_t>(kv_block_size);
  return block;
}

// The sampled queries of a block. A block is cut into as many equal parts as there are samples, at
// most one for each query, and the last query of each part is sampled. Uses the integers of the
// caller.
template <class Int>
PBS_HOST_DEVICE constexpr Int num_samples_of(Int num_rows, Int num_samples) {
  return num_samples < num_rows ? num_samples : num_rows;
}
template <class Int>
PBS_HOST_DEVICE constexpr Int sample_row(Int num_rows, Int count, Int nth) {
  return (nth + 1) * num_rows / count - 1;
}

}  // namespace pbs
