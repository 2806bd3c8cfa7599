// Code that attend shares with the kernels that run before it.
#pragma once

#include <cuda_runtime.h>

#include "pbs/params.h"
#include "pbs/work_order.h"

namespace pbs::cuda {

struct OrderArgs {
  Problem problem;
  Blocking blocking;
  bool is_causal;
  const uint32_t* block_mask;
  int32_t num_mask_words;  // words per row of block_mask
  WorkGroups groups;
  OrderLayout layout;
  int32_t* workspace;
  bool is_counted;  // whether the workspace has the counts of selected blocks
};

// If masks are long, launches a kernel that counts the selected blocks of each query block.
cudaError_t launch_count(OrderArgs& args, cudaStream_t stream);

}  // namespace pbs::cuda
