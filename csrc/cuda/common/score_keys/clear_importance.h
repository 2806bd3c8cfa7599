// score_keys without queries or keys to score: every key has importance 0.
#pragma once

#include <cuda_runtime.h>

#include "pbs/params.h"

namespace pbs::cuda {

// Returns an error as text, or null.
inline const char* clear_importance(const ScoreKeysParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int64_t num_keys = problem.batch * problem.num_perm_heads * problem.num_kv;
  const cudaError_t error = cudaMemsetAsync(params.importance, 0, num_keys * sizeof(float), stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda
