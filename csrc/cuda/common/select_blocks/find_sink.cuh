// Finds the key block that is always visited.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda {

// The permuted key block that holds token 0.
__device__ inline int find_sink(const SelectBlocksParams& params, int64_t b, int64_t hp) {
  const Problem& problem = params.problem;
  if (params.perm == nullptr) return 0;
  const int32_t* perm = params.perm + (b * problem.num_perm_heads + hp) * problem.num_kv;
  const auto size = static_cast<int>(smaller(params.blocking.segment_size, problem.num_kv));
  int place = 0;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x) % 32; i < size; i += 32) {
    if (perm[i] == 0) place = i;
  }
  return __reduce_max_sync(~0u, place) / static_cast<int>(params.blocking.kv_block_size);
}

}  // namespace pbs::cuda
