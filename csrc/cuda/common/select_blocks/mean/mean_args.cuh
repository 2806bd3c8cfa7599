// Launch arguments that all kernels of mean scores share.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "pbs/bitmask.h"
#include "pbs/params.h"
#include "pbs/select_rows.h"

namespace pbs::cuda {

struct MeanArgs {
  SelectBlocksParams params;
  float* own_means;  // (B, Hkv, num_kv_blocks, D), keys in original order; causal mass only
  int num_q_blocks;
  int num_kv_blocks;
  int num_words;
  int row_stride;  // floats from one row of logits to the next
};

// Some query blocks of one head.
struct SelectTile {
  int64_t b;
  int64_t hq;
  int first_block;
  int num_blocks;
};

__device__ inline QueryBlock block_of(const MeanArgs& args, const SelectTile& tile, int row) {
  return query_block(tile.first_block + row, args.params.problem, args.params.blocking,
                     args.params.is_causal);
}

// Query blocks of all heads.
inline int64_t num_select_rows(const SelectBlocksParams& params) {
  const Problem& problem = params.problem;
  return problem.batch * problem.num_q_heads * num_query_blocks(problem, params.blocking);
}

inline int64_t own_means_bytes(const SelectBlocksParams& params) {
  const Problem& problem = params.problem;
  if (!counts_own_mass(params.rule)) return 0;
  return problem.batch * problem.num_kv_heads * num_key_blocks(problem, params.blocking) *
         problem.head_dim * static_cast<int64_t>(sizeof(float));
}

// Returns an error as text, or null.
inline const char* fill_mean_args(const SelectBlocksParams& params, void* workspace,
                                  MeanArgs& args) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  if (num_select_rows(params) > std::numeric_limits<int32_t>::max()) {
    return "too many query blocks for one grid";
  }
  args.params = params;
  args.own_means = static_cast<float*>(workspace);
  args.num_q_blocks = static_cast<int>(num_query_blocks(problem, blocking));
  args.num_kv_blocks = static_cast<int>(num_key_blocks(problem, blocking));
  args.num_words = static_cast<int>(num_mask_words(args.num_kv_blocks));
  args.row_stride = static_cast<int>(logit_stride(num_mass_entries(params)));
  return nullptr;
}

// Writes own_means if the rule needs them.
cudaError_t launch_own_means(const MeanArgs& args, cudaStream_t stream);

}  // namespace pbs::cuda
